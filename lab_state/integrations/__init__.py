"""Integrations with frameworks. Each module is for one framework, and imports only that framework."""
