"""As many apps have it."""

import os
from pathlib import Path

HERE = Path(__file__).parent


class Config:
    SECRET_KEY = os.environ.get("SECRET_KEY") or "you-will-never-guess"
    SQLALCHEMY_DATABASE_URI = (
        os.environ.get("DATABASE_URL", "").replace("postgres://", "postgresql://") or f"sqlite:///{HERE / 'club.db'}"
    )
