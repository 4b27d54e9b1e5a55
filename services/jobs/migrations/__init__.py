"""Alembic revisions of the tables of `jobs`; `libs.db.migrate` applies them at the start."""
