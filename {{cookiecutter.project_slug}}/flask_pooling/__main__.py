"""`python -m flask_pooling`: commands that need neither an app nor its settings."""

import click

from flask_pooling.fleet import fleet

if __name__ == "__main__":
    click.Group("flask_pooling", commands=[fleet], help="Workers, threads and database connections.")()
