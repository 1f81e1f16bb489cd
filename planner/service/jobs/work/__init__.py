"""What each kind of job does, in a worker process: a file of the kind's name, whose function `do` takes an order and
returns the job's result and the files that it made. `upload` and `view` are done for a request that waits.

May import: `service.jobs.{orders,store,cache,labels}`, `service.wire`, the planner, `profiles`, `runtime`.
"""
