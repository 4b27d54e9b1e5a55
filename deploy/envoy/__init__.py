"""Renders the configuration of the edge, Envoy, for any kind of deployment.

Everything that differs between deployments is a parameter: addresses, the file of the public keys,
the folder of the files. Others use `render` (`Edge`, `files`, `write`, `argv`) and the names and
limits in `routes` and `replies`. It knows nothing of `deploy.local` or of private keys.
"""
