"""Counts by hour: the same as counting anew, whatever came, was taken back, and went by."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import numpy as np
from sqlalchemy.engine import Engine

from app.database import writing
from app.serving.activity import MAX_POPULAR_HOURS, REFERENCE_WINDOWS, Activity
from app.serving.event_store import store_events
from app.serving.new_events import NewEvent
from ml.snapshots import DEFAULT_MEANINGS

START = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


class Story:
    """Events that are stored in rounds, and what they come to."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.generator = np.random.default_rng(seed)
        self.now = START
        self.counted: dict[str, tuple[str, datetime]] = {}  # by event id: item and moment
        self.activity = Activity(DEFAULT_MEANINGS, clock=lambda: self.now)

    def go_on(self, events: int, hours: float) -> None:
        """Store events of the weeks before now, take a few back, and let time pass."""
        batch = []
        for _ in range(events):
            event_id = f"e{self.generator.integers(10**9)}"
            item_id = f"item-{self.generator.integers(6)}"
            # Some in the minutes ahead that are allowed, some far too long ago.
            moment = self.now + timedelta(hours=0.05 - float(self.generator.exponential(150)))
            kind = "impression" if self.generator.random() < 0.1 else "click"
            batch.append(NewEvent("u", event_id, item_id, kind, None, moment))
            if kind == "click":
                self.counted[event_id] = (item_id, moment)
        for event_id in self.generator.choice(sorted(self.counted), 4):
            self.counted.pop(str(event_id), None)
            retract = f"r{self.generator.integers(10**9)}"
            batch.append(NewEvent("u", retract, None, "retract", None, self.now, retracts=str(event_id)))
        with writing(self.engine) as connection:
            store_events(connection, batch, "create")
        with self.engine.connect() as connection:
            self.activity.poll(connection)
        self.now += timedelta(hours=hours)
        with self.engine.connect() as connection:
            self.activity.poll(connection)

    def between(self, first: int, last: int) -> Counter[str]:
        """Interactions by item in the hours from first to last, counted anew."""
        hours = {key: int(moment.timestamp() // 3600) for key, (_, moment) in self.counted.items()}
        return Counter(item for key, (item, _) in self.counted.items() if first <= hours[key] <= last)


def test_any_window_at_any_time(engine: Engine) -> None:
    story = Story(engine, seed=5)
    for events, passing in ((60, 0.0), (30, 0.7), (30, 30.0), (20, 200.0), (20, 1.0), (5, 700.0)):
        story.go_on(events, passing)
        hour = int(story.now.timestamp() // 3600)
        for window in (1, 24, 168, MAX_POPULAR_HOURS):
            expected = story.between(hour - window, hour + 1)
            found = list(story.activity.ranked("popular", window))
            assert found == sorted(((i, float(c)) for i, c in expected.items()), key=lambda pair: (-pair[1], pair[0]))
        for window in (1, 24, 168):
            recent = story.between(hour - window, hour + 1)
            earlier = story.between(hour - window * (1 + REFERENCE_WINDOWS), hour - window - 1)
            elapsed = window + (story.now.timestamp() % 3600) / 3600
            score = {}
            for item_id, count in recent.items():
                likely = earlier[item_id] * elapsed / (REFERENCE_WINDOWS * window)
                if count > likely:
                    score[item_id] = (count - likely) / (likely + 1) ** 0.5
            found = list(story.activity.ranked("trending", window))
            np.testing.assert_allclose([value for _, value in found], sorted(score.values(), reverse=True), rtol=1e-9)
            assert {item_id for item_id, _ in found} == set(score)
