"""What `make load` asks of the running service. Add tasks for your own views: Locust's manual says how.

    make load                                4 clients for each slot; each asks again when it has its answer
    make load RATE=200                       200 requests a second, as long as an answer takes less than one
    make load ARGS="--users 20 --run-time 60s"

The first finds out how much the service can do. Only the second shows waiting as users see it, since clients that wait
for their answers ask less when the service is slow. Both only read. Fill the tables first: an empty page costs less
than yours will.
"""

from locust import HttpUser, task

from scripts import held_to_plan


class Reader(HttpUser):
    wait_time, on_start = held_to_plan.wait_time, held_to_plan.on_start

    @task(4)
    def page(self) -> None:
        self.client.get("/api/notes?limit=20")

    @task(1)
    def home(self) -> None:
        self.client.get("/")
