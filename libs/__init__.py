"""Code that services, the command line and the deployment share; it imports none of them.

Packages say in their `__init__` what others may use. `gen` is generated from `protos`, and imported
as `headrace.*`.
"""
