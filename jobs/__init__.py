"""The jobs: each is one arrow of the data flow, run as `python -m jobs.NAME`."""
