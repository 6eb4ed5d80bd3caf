"""The running service as one object: what a process holds in memory, and the thread that keeps it up to date."""

import threading
import time
from dataclasses import dataclass, field
from typing import Annotated

import sqlalchemy as sa
import structlog
from fastapi import Depends, Request
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from app import migrations
from app.database import create_engine, is_outage, reading
from app.security import KeyRing
from app.serving.active_models import ActiveModels
from app.serving.activity import Activity
from app.serving.catalog import Catalog
from app.serving.charts import Charts
from app.serving.cursors import Cursors
from app.serving.exploration import Explorer
from app.serving.feedback_writer import FeedbackWriter
from app.serving.histories import Histories
from app.serving.latest import Latest
from app.serving.popularity import Popularity
from app.serving.query import Query
from app.serving.ranked_lists import RankedLists
from app.serving.ranking import Ranker
from app.serving.recommendation_log import RecommendationLog
from app.serving.resurfacing import Resurfacing
from app.serving.rounds import Rounds
from app.serving.sessions import Sessions
from app.serving.similar import SimilarItems
from app.serving.warming import Warming
from app.settings import Settings
from app.sqlite_checkpoints import SqliteCheckpoints
from app.telemetry import Metrics
from ml.prepared import WAYS
from ml.registry import Registry
from ml.store import Store, open_store

log = structlog.get_logger(__name__)


@dataclass
class Service:
    """Every part of one serving process. `start` and `stop` belong to the application's lifespan."""

    settings: Settings
    engine: Engine
    store: Store
    registry: Registry
    keys: KeyRing
    metrics: Metrics
    catalog: Catalog
    histories: Histories
    active_models: ActiveModels
    popularity: Popularity
    activity: Activity
    latest: Latest
    charts: Charts
    similar: SimilarItems
    sessions: Sessions
    recommendation_log: RecommendationLog
    feedback_writer: FeedbackWriter
    cursors: Cursors
    ranker: Ranker
    rounds: Rounds
    warming: Warming = field(init=False)
    checkpoints: SqliteCheckpoints | None  # None on another database
    database_answers: bool = False
    migrated: bool = False
    # Query strings of requests for recommendations that were valid, as what they ask for.
    known_queries: dict[bytes, Query] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _poll_lock: threading.Lock = field(default_factory=threading.Lock)
    _follower: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.warming = Warming(
            self.engine,
            self.histories,
            is_ready=lambda: self.ready,
            is_asked=lambda: self.histories.is_asked or len(self.feedback_writer) > 0,
            look_up=self.active_models.look_up,
        )

    @property
    def ready(self) -> bool:
        """Whether requests can be answered: once it is, the service stays so without its database too."""
        return self.migrated and self.catalog.loaded and self.popularity.loaded and self.cursors.loaded

    def start(self) -> None:
        """Start the threads and load what can be loaded; a database that is away is waited for behind the requests."""
        self.feedback_writer.start()
        self.recommendation_log.start()
        if self.checkpoints is not None:
            self.checkpoints.start()
        self.poll()
        self._follower = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._follower.start()

    def stop(self) -> None:
        """Commit the feedback that waits, write the log, and let go of the database."""
        self._stopping.set()
        if self._follower is not None:
            self._follower.join()
        self.feedback_writer.stop()
        self.recommendation_log.stop()
        if self.checkpoints is not None:
            self.checkpoints.stop()
        self.engine.dispose()

    def poll(self) -> bool:
        """Bring catalogue, popularity and active version up to date; False if the database does not answer.

        The follower calls it every `model_poll_seconds`; a route that changed one of them calls it to be heard at once.
        """
        with self._poll_lock:
            answered = self._try_to_poll()
            if answered != self.database_answers:
                log.info("database_answers" if answered else "database_unreachable")
            self.database_answers = answered
            if answered:
                self.histories.forget_outage()
            self._report()
            return answered

    def _try_to_poll(self) -> bool:
        try:
            with reading(self.engine) as connection:
                self._poll(connection)
            if self.migrated:
                self.cursors.load(self.engine)
        except SQLAlchemyError as error:
            if not is_outage(error):
                raise
            return False
        return True

    def _report(self) -> None:
        models = self.active_models
        gauges = {
            "catalog_items": ("Items in the catalogue.", len(self.catalog)),
            "version_failed": (
                "1 while the version to be active cannot be loaded.",
                models.failure is not None,
            ),
            "version_retrieves": (
                "1 while the active version's candidates come from an approximate index.",
                models.current is not None and models.current.recommender.retrieves,
            ),
            "version_swaps": ("Times that another version went live in this process.", models.swaps),
            "recommendation_log_waiting": ("Answers that wait to be logged.", len(self.recommendation_log)),
            "feedback_waiting": ("Feedback requests that wait for their commit.", len(self.feedback_writer)),
            "database_answers": ("1 while the database answers.", self.database_answers),
        }
        for name, (description, value) in gauges.items():
            self.metrics.gauge(name, description).set(value)

    def ask_database(self) -> bool:
        """Whether the database answers at this moment."""
        try:
            with self.engine.connect() as connection:
                connection.execute(sa.select(1))
        except SQLAlchemyError:
            return False
        return True

    def _poll(self, connection: Connection) -> None:
        if not self.migrated:
            self.migrated = migrations.current(connection) == migrations.head()
            if not self.migrated:
                return
        self.catalog.follow(connection)
        self.active_models.keep_up(self.histories.items)
        self.histories.forget_erased()
        self.popularity.poll(connection)
        self.activity.poll(connection)
        self.latest.poll()
        self.active_models.poll(connection)
        self.active_models.keep_up(self.histories.items)

    def _follow(self) -> None:
        while not self._stopping.wait(self.settings.model_poll_seconds):
            started = time.monotonic()
            try:
                if self.poll():
                    self.popularity.save(self.engine)
            except Exception:  # the thread must outlive whatever it meets: without it nothing new would be seen
                log.exception("poll_failed")
            self.metrics.gauge("poll_seconds", "Time of the last look at the database.").set(time.monotonic() - started)


def build_service(settings: Settings) -> Service:
    """Put the parts together; nothing is read or started yet."""
    metrics = Metrics()
    engine = create_engine(settings.resolved_database_url)
    store = open_store(settings.resolved_store_url)
    registry = Registry(store, settings.data_dir / "cache")
    catalog = Catalog()
    rankings = metrics.counter(
        "rankings", "Rankings by a model, by how it found the items: scored, screened, retrieved or starved.", ("way",)
    )
    by_way = {way: rankings.labels(way) for way in WAYS}
    active_models = ActiveModels(
        registry,
        store,
        catalog,
        retrieval_from=settings.retrieval_from,
        on_ranked=lambda way: by_way[way].inc(),
    )
    histories = Histories(engine, catalog, settings.event_meanings, settings.max_history, on_news=active_models.keep_up)
    popularity = Popularity(settings.event_meanings, catalog)
    activity = Activity(settings.event_meanings, quiet_through=popularity.quiet_through)
    latest = Latest(catalog)
    lost = metrics.counter("recommendation_log_lost", "Answers that did not reach the recommendation log.")
    recommendation_log = RecommendationLog(engine, on_lost=lost.inc)
    groups = metrics.counter("feedback_commits", "Transactions that stored feedback.")
    rows = metrics.counter("feedback_rows", "Rows of feedback that were judged.")

    def committed(number: int) -> None:
        groups.inc()
        rows.inc(number)

    feedback_writer = FeedbackWriter(
        engine, max_waiting=settings.feedback_queue, unknown_items=settings.unknown_items, on_commit=committed
    )
    cursors = Cursors()
    resurfacing = Resurfacing(settings.resurface_after_days, settings.resurface_discount)
    lists = RankedLists(catalog, active_models, popularity, resurfacing)
    ranker = Ranker(
        catalog=catalog,
        histories=histories,
        active_models=active_models,
        popularity=popularity,
        lists=lists,
        explorer=Explorer(catalog, popularity, settings.exploration_share, settings.exploration_below),
        cursors=cursors,
        recommendation_log=recommendation_log,
    )
    return Service(
        settings=settings,
        engine=engine,
        store=store,
        registry=registry,
        keys=KeyRing(engine, settings.key_cache_seconds),
        metrics=metrics,
        catalog=catalog,
        histories=histories,
        active_models=active_models,
        popularity=popularity,
        activity=activity,
        similar=SimilarItems(catalog, active_models, popularity, recommendation_log),
        sessions=Sessions(
            catalog=catalog,
            active_models=active_models,
            popularity=popularity,
            lists=lists,
            recommendation_log=recommendation_log,
            max_history=settings.max_history,
        ),
        latest=latest,
        charts=Charts(catalog, popularity, activity, latest, recommendation_log),
        recommendation_log=recommendation_log,
        feedback_writer=feedback_writer,
        cursors=cursors,
        ranker=ranker,
        rounds=Rounds(histories, ranker),
        checkpoints=SqliteCheckpoints(engine) if engine.dialect.name == "sqlite" else None,
    )


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
