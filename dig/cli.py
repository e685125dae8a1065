"""The command line of ``python -m dig``."""

from __future__ import annotations

import typer

from dig.command_line import OneLineGroup, root
from dig.commands.classifier import classifier_command
from dig.commands.consolidate import consolidate_command
from dig.commands.encode import encode_command
from dig.commands.evaluate import evaluate_command
from dig.commands.export import export_command
from dig.commands.helps import FIRST, HELPS
from dig.commands.sample import sample_command
from dig.commands.train import train_command
from dig.helping import add_help

HELP = "Train DiG and its peers on images, sample from them, and measure the samples."
app = typer.Typer(cls=OneLineGroup, add_completion=False, no_args_is_help=True)
app.callback(help=HELP)(root)
app.command("train")(train_command)
app.command("sample")(sample_command)
app.command("export")(export_command)
app.command("evaluate")(evaluate_command)
app.command("classifier")(classifier_command)
app.command("consolidate")(consolidate_command)
app.command("encode")(encode_command)
add_help(app, HELPS, FIRST)
