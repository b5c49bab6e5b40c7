"""The SQL of the floor, written by hand."""

COLUMNS = "id, title, body, created_at, updated_at"
GET = f"select {COLUMNS} from notes where id = %s"  # noqa: S608
PAGE = f"select {COLUMNS} from notes where id > %s order by id limit %s"  # noqa: S608
CREATE = f"insert into notes (title, body, created_at, updated_at) values (%s, %s, %s, %s) returning {COLUMNS}"  # noqa: S608
SLOW = "select pg_sleep(0.05)"


def as_dict(row):
    return {
        "id": row[0],
        "title": row[1],
        "body": row[2],
        "created_at": row[3].isoformat(),
        "updated_at": row[4].isoformat(),
    }
