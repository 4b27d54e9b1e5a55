"""Triton without a container, the models that come with Headrace, and tuning.

* `command`: the command line, environment and folders of one Triton; `run`: the process that runs
  it; `stubs`: finds crashed model processes.
* `artifact`: packs models; `models`, `gpu`: their folders, which run inside Triton and import
  nothing from here.
* `tune`: measures settings of a model.

Others use `command.remove_shared_memory`, `artifact`, `tune.session` and `python -m
deploy.triton.run`.
"""
