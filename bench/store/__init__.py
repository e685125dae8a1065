"""Rows on the disk: schema, migrations, reading and writing, which rows count, content addresses, export."""
