"""What runs a mesh. It starts the services as processes and never imports them.

* `local`: a mesh on this machine.
* `envoy`: the configuration of the edge, for any kind of deployment.
* `triton`: Triton, the bundled models, and the tuning of a model's settings.
* `client`: calls to a running mesh through its edge.
* `keys`, `host`, `errors`: what these share.

`cli` prints what they do.
"""
