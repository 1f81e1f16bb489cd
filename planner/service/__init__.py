"""The planner as a service: the same library calls as the command line, over HTTP, with jobs, a store and a page.

Read in this order:

- `settings`: what whoever starts the service decides
- `schema`, `errors`: what goes over the wire
- `objects`, `store`: what lies in the data folder
- `worker`, `supervisor`: the processes that solve, measure and run, and who looks after them
- `app`, `routes_*`: the doors; `view`: a plan as the page shows it; `page/`: the page
- `client`: the same from another machine

Nothing is imported here: FastAPI, uvicorn and httpx come with ``pip install tightfit[serve]``.
"""
