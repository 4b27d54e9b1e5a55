"""The alembic revisions of the registry's tables; `libs.db.migrate` applies them at the start."""
