"""CPU seconds to import Flask and Flask-SQLAlchemy and to make one engine: what no app on them can go below."""

import os
import time

bare = time.process_time()
from flask import Flask  # noqa: E402
from flask_sqlalchemy import SQLAlchemy  # noqa: E402

db = SQLAlchemy()
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:")
db.init_app(app)
with app.app_context():
    assert db.engine
print(f'{{"both": {time.process_time() - bare}}}')
