"""Gates of the rows that a trainer draws: they are trained on as declared, can be learned from,
come in a new order each epoch, and held-out rows are not among them.
"""

from collections import Counter, deque

from stackproof.contracts.events import (
    BatchDrawn,
    Event,
    ModelInput,
    RowHashes,
    Started,
    StateRestored,
    StepTaken,
)
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    not_run,
    passed,
)


@decides("data.rows")
class Rows(RuntimeCheck):
    """The position advances without a gap, each step draws what is declared and trains on it, every
    token is counted once, and no window repeats within its epoch.
    """

    events = (Started, BatchDrawn, StepTaken)
    kept = ("cursor", "order", "recent", "sample_ids", "counted")

    def __init__(self, limits):
        super().__init__(limits)
        self.plan, self.cursor = None, None
        self.order, self.tokens_seen = "", 0
        self.drawn: list[int] = []
        self.sample_ids: list[int] = []
        self.counted = False
        self.recent: deque[tuple[int, int]] = deque(maxlen=int(limits.recent_windows_min))

    def missing(self) -> str:
        drawn = "" if self.sample_ids else "the rows that were drawn"
        return drawn or ("" if self.counted else "the tokens of a step")

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case Started():
                return self._start(event)
            case BatchDrawn():
                self.sample_ids = list(event.sample_ids)
                return self._position(event) or self._windows(event)
            case StepTaken():
                self.counted = True
                return self._trained_on(event) or self._tokens(event)

    def _start(self, event: Started) -> Verdict | None:
        plan = event.plan
        if self.cursor is not None and self.cursor != plan["cursor"]:
            return failed(
                f"the run continues at sample {plan['cursor']}; it had stopped at {self.cursor}",
                cursor=self.cursor,
            )
        order = plan.get("order", "")
        if order != self.order:  # another seed, corpus or length: its windows are others
            self.recent.clear()
        self.plan, self.cursor, self.order = plan, plan["cursor"], order
        self.drawn, self.tokens_seen = list(plan["drawn"]), plan["tokens_seen"]
        return None

    def _position(self, event: BatchDrawn) -> Verdict | None:
        """Red unless the step drew the declared number of samples and tokens, from the position
        where the last step ended.
        """
        rows, tokens = self.plan["rows_per_step"], self.plan["tokens_per_step"]
        expected = (self.cursor, self.cursor + rows, rows)
        if (event.cursor_before, event.cursor_after, len(event.sample_ids)) != expected:
            return failed(
                f"step {event.step}: samples {event.cursor_before} … {event.cursor_after} were "
                f"drawn, {self.cursor} … {self.cursor + rows} declared",
                cursor=event.cursor_after,
            )
        if event.n_tokens != tokens:
            return failed(
                f"step {event.step}: {event.n_tokens} tokens drawn, {tokens} declared",
                tokens=event.n_tokens,
            )
        self.cursor = event.cursor_after
        return None

    def _windows(self, event: BatchDrawn) -> Verdict:
        """Every row belongs to the current epoch of its source, is a window that exists, and is new
        in that epoch.
        """
        wrong_epochs = outside = 0
        for source, epoch, window in zip(
            event.sources, event.epochs, event.sample_ids, strict=True
        ):
            held = self.plan["sources"][source]
            wrong_epochs += epoch != self.drawn[source] // held["n_windows"]
            outside += not held["first"] <= window < held["first"] + held["n_windows"]
            self.drawn[source] += 1
        if wrong_epochs or event.epoch != max(event.epochs):
            return failed(
                f"step {event.step}: {wrong_epochs} row(s) are not of the current epoch of their "
                "source",
                wrong_epochs=wrong_epochs,
            )
        keys = list(zip(event.epochs, event.sample_ids))
        repeats = len(keys) - len(set(keys)) + len(set(keys) & set(self.recent))
        self.recent.extend(keys)
        return decide(
            not repeats and not outside,
            f"step {event.step}: {repeats} window(s) repeat within their epoch, {outside} are "
            "outside the corpus",
            repeats=repeats,
            outside=outside,
        )

    def _trained_on(self, event: StepTaken) -> Verdict | None:
        """Red if the step trained on other windows than were drawn for it."""
        if sorted(event.sample_ids) == sorted(self.sample_ids):
            return None
        others = sum((Counter(event.sample_ids) - Counter(self.sample_ids)).values())
        return failed(
            f"step {event.step}: it trained on {len(event.sample_ids)} window(s), {others} of them "
            f"not drawn for it; {len(self.sample_ids)} were drawn",
            not_drawn=others,
        )

    def _tokens(self, event: StepTaken) -> Verdict:
        """The step counts the declared tokens, most of them in the loss, and the total adds up."""
        per_step = self.plan["tokens_per_step"]
        self.tokens_seen += per_step
        valid_frac = event.n_valid_tokens / per_step
        return decide(
            event.tokens_seen == self.tokens_seen
            and event.n_expected_tokens == per_step
            and self.limits.valid_frac_min <= valid_frac <= 1,
            f"step {event.step}: {event.tokens_seen} tokens seen, {self.tokens_seen} declared; "
            f"{event.n_valid_tokens} of {per_step} counted in the loss",
            tokens_seen=event.tokens_seen,
            declared_tokens=self.tokens_seen,
            valid_frac=valid_frac,
        )


@decides("data.learnable-batch")
class LearnableBatch(RuntimeCheck):
    """Ids are in the vocabulary, rows fit the model, there are labels to learn, also on stop
    tokens, and none on padding.
    """

    events = (ModelInput,)

    def observe(self, event: ModelInput) -> Verdict:
        limits = self.limits
        bad_id = event.max_id if event.min_id >= 0 else event.min_id
        return decide_all(
            [
                (
                    event.min_id < 0
                    or (bool(event.embedding_rows) and event.max_id >= event.embedding_rows)
                )
                and f"id {bad_id} is outside the embedding of {event.embedding_rows} rows",
                bool(event.max_length)
                and event.length > event.max_length
                and f"rows of {event.length} tokens exceed the {event.max_length} positions",
                event.n_labels > 0
                and event.n_valid < limits.valid_min
                and "no label is left to learn from",
                event.n_stops > 0
                and event.n_stops_learned == 0
                and f"{event.n_stops} stop token(s) end learned text, none has a label",
                event.n_padding_labels > limits.padding_labels_max
                and f"{event.n_padding_labels} label(s) are on padding",
                event.n_left_padded > limits.left_padded_max
                and (
                    f"{event.n_left_padded} row(s) begin with padding that the attention_mask "
                    "marks as text"
                ),
                event.n_places_up < limits.places_up_frac_min * event.n_places
                and (
                    f"only {event.n_places_up} of {event.n_places} position_ids are one more than "
                    "the one before"
                ),
            ],
            f"step {event.step}: ",
            max_id=event.max_id,
            embedding_rows=event.embedding_rows,
            length=event.length,
            n_valid=event.n_valid,
            n_stops=event.n_stops,
            n_stops_learned=event.n_stops_learned,
            n_padding_labels=event.n_padding_labels,
            n_left_padded=event.n_left_padded,
            places_up_frac=event.n_places_up / event.n_places if event.n_places else 1.0,
        )


@decides("data.fresh-rows")
class FreshRows(RuntimeCheck):
    """Rows are not drawn again in the same order, and few of the scored rows were trained on.

    The order is the same where each of many consecutive rows comes the same distance after its last
    occurrence: an epoch that is not reshuffled, or one batch again and again. The first `MEMORY`
    rows are kept. The verdict is not_run where it could not have been red: too few rows were drawn
    or scored, or rows trained on before a resume or beyond the memory are unknown. An evaluation of
    too few rows keeps the verdict of the one before it, unless one of its rows was trained on.
    """

    events = (RowHashes, Started, StateRestored)
    MEMORY = 500_000

    def __init__(self, limits):
        super().__init__(limits)
        self.trained: dict[int, int] = {}
        self.drawn = self.lag = self.in_order = self.again = 0
        self.scored = self.known = 0
        self.epoch: int | None = None
        self.of_epoch: set[int] = set()
        self.repeated = self.drawn_in_epoch = 0
        self.held_out: set[int] = set()
        self.new_held_out: list[int] = []
        self.step, self.resumed_at, self.full, self.unscored, self.judged = 0, 0, False, "", False

    def observe(self, event: Event) -> Verdict | None:
        if not isinstance(event, RowHashes):
            if event.step > self.step:
                self.resumed_at = event.step
            return None
        if event.phase == "evaluation":
            return self._scored(event)
        self.scored, self.known, self.step = 0, 0, event.step
        self.held_out |= set(self.new_held_out)
        self.new_held_out = []
        for row in event.rows:
            self._draw(row)
        if verdict := self._within_epoch(event):
            return verdict
        measured = {"rows_in_order": self.in_order, "drawn": self.drawn}
        if self.in_order > self.limits.rows_in_order_max:
            again = (
                f"the last {self.in_order} rows came in the order they had {self.lag} rows before"
            )
            return failed(
                f"step {event.step}: {again}: nothing shuffles, or not anew each epoch", **measured
            )
        return self._unless(self._unordered() or self.unscored, measured)

    def _within_epoch(self, event: RowHashes) -> Verdict | None:
        """Red if many rows have come more than once in an epoch whose number is stated."""
        if event.epoch is None:
            return None
        if event.epoch != self.epoch:
            self.epoch, self.of_epoch, self.repeated, self.drawn_in_epoch = event.epoch, set(), 0, 0
        for row in event.rows:
            self.repeated += row in self.of_epoch
            self.drawn_in_epoch += 1
            if len(self.of_epoch) < self.MEMORY:
                self.of_epoch.add(row)
        frac = self.repeated / max(1, self.drawn_in_epoch)
        if self.repeated < self.limits.repeated_min or frac <= self.limits.repeated_frac_max:
            return None
        return failed(
            f"step {event.step}: {self.repeated} of the {self.drawn_in_epoch} rows of epoch "
            f"{event.epoch} had come before in it: workers share their rows, or the data set holds "
            "rows many times",
            repeated_frac=frac,
            repeated=self.repeated,
        )

    def _drifted(self, event: RowHashes) -> Verdict | None:
        """Red if an evaluation scores other rows than those before it."""
        if not event.set_declared:
            return None
        self.new_held_out += event.rows
        n = len(self.new_held_out)
        if not self.held_out or n < self.limits.scored_min:
            return None
        frac = sum(row not in self.held_out for row in self.new_held_out) / n
        if frac <= self.limits.other_held_out_frac_max:
            return None
        return failed(
            f"step {event.step}: {frac:.0%} of {n} held-out rows were in no evaluation before: "
            "scores of different rows are compared",
            other_held_out_frac=frac,
        )

    def _draw(self, row: int) -> None:
        before = self.trained.get(row)
        if before is not None or len(self.trained) < self.MEMORY:
            self.trained[row] = self.drawn
        else:
            self.full = True
        lag = 0 if before is None else self.drawn - before
        self.in_order = self.in_order + 1 if lag and lag == self.lag else int(lag > 0)
        self.lag, self.drawn, self.again = lag, self.drawn + 1, self.again + (lag > 0)

    def _unordered(self) -> str:
        """The reason why an order could not have been found, or an empty string."""
        least = int(self.limits.rows_in_order_max) + 2
        if self.drawn < least:
            return f"fewer than {least} rows that are long enough were drawn, too few for an order"
        if self.resumed_at and self.again <= self.limits.rows_in_order_max:
            return (
                f"rows drawn before step {self.resumed_at} are not known, and those since have "
                "hardly come again"
            )
        return (
            f"only the first {self.MEMORY:,} rows are remembered, and there were more"
            if self.full
            else ""
        )

    def _scored(self, event: RowHashes) -> Verdict:
        """Judge all batches of one evaluation together, from `scored_min` rows on."""
        self.scored, self.known = (
            self.scored + len(event.rows),
            self.known + sum(r in self.trained for r in event.rows),
        )
        measured = {"trained_frac": self.known / max(1, self.scored), "scored": self.scored}
        if verdict := self._drifted(event):
            return verdict
        if self.scored < self.limits.scored_min:
            if self.known or not self.judged:
                few = (
                    f"an evaluation had {self.scored} rows that are long enough, {self.known} of "
                    "them trained on"
                )
                self.unscored = (
                    f"{few}: a share is judged from {int(self.limits.scored_min)} rows on"
                )
            return self._unless(self.unscored or self._unordered(), measured)
        if measured["trained_frac"] > self.limits.trained_frac_max:
            return failed(
                f"step {event.step}: {self.known} of {self.scored} held-out rows were trained on",
                **measured,
            )
        before = (
            f"rows trained on before step {self.resumed_at} are not known; held-out rows may be "
            "among them"
        )
        self.judged, self.unscored = True, before if self.resumed_at else ""
        return self._unless(self.unscored or self._unordered(), measured)

    def _unless(self, reason: str, measured: dict) -> Verdict:
        return not_run(reason) if reason else passed(**measured)
