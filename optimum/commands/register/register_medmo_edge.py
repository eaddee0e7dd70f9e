"""Registers `optimum-cli export medmo-edge`; Optimum loads every file of this namespace package."""

from optimum.commands.export.base import ExportCommand

from medmo_edge.export.optimum_command import MedmoEdgeExportCommand

REGISTER_COMMANDS = [(MedmoEdgeExportCommand, ExportCommand)]
