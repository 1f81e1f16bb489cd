"""The planner as a service: the same library calls as the command line, over HTTP, with jobs, a store and a page.

Rooms: `wire` (messages, errors, settings, objects), `jobs` (store, workers, their supervisor), `http` (application and
routes), `page/` (the page, in plain JavaScript); `client` is the same from another machine. FastAPI, uvicorn and httpx
come with ``pip install tightfit[serve]``.
"""
