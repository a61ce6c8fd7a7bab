"""Schemas, and the migration of a state at its start."""

from lab_state._migrations._draft import MigrationDraft
from lab_state._migrations._schema import ANY, WITHOUT, Schema, checked_schema
from lab_state._migrations._start import Committed, SchemaStart
from lab_state._migrations._versions import check_follower

__all__ = ["ANY", "WITHOUT", "Committed", "MigrationDraft", "Schema", "SchemaStart", "check_follower", "checked_schema"]
