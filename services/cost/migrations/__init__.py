"""Alembic revisions of the tables of `cost`; `libs.db.migrate` applies them at the start."""
