"""The club's own suite: it makes the tables of its database, and drops them."""

import unittest

from config import Config
from members import create_app, db


class TestConfig(Config):
    TESTING = True
    SQLALCHEMY_DATABASE_URI = "sqlite://"


class MemberCase(unittest.TestCase):
    def setUp(self):
        self.app = create_app(TestConfig)
        self.context = self.app.app_context()
        self.context.push()
        db.create_all()

    def tearDown(self):
        db.session.remove()
        db.drop_all()
        self.context.pop()

    def test_members(self):
        client = self.app.test_client()
        self.assertEqual(client.get("/members").status_code, 401)
        self.assertEqual(client.post("/join", data={"name": "susan"}).status_code, 201)
        self.assertEqual(client.get("/members").json, {"me": "susan", "members": ["susan"]})


if __name__ == "__main__":
    unittest.main()
