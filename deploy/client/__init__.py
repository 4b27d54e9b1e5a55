"""A client of a running mesh, wherever it runs: it needs the edge's address and a token.

Others use `edge.EdgeClient`, `deployer.Deployer` (register and deploy a model version),
`bundled.deploy_bundled_models`, `registry.Registry` (list and change deployments), `answers`
(stream one answer, read its cost), `costs` (prices and sums of usage), `jobs.JobClient` and
`conversation.Conversation`. Nothing here prints.
"""
