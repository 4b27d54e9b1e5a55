"""Alembic revisions of the tables of `registry`; `libs.db.migrate` applies them at the start."""
