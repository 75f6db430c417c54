"""Plants in the mixing of sources: shares, warm-up, bandit, its state,
and what happens when sources change.
"""

from dataclasses import replace

import numpy as np

from stackproof.data import bandit, reader
from stackproof.data import curriculum as mixing
from stackproof.museum.plant import plant, swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


@plant(
    "curriculum.floor-ignored",
    gate="curriculum.order",
    title="Floors are wishes",
    story=(
        "Weights are normalised, and floors and caps are compared with the weights before that. "
        "Whether they hold depends on what the weights add up to. A source that was to have a "
        "tenth of the rows has a hundredth."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def floor_ignored():
    def plain(sources):
        weights = np.array([s.weight for s in sources])
        return weights / weights.sum()

    with swap(bandit, "shares", plain):
        yield


@plant(
    "curriculum.bounds-left-behind",
    gate="curriculum.order",
    title="Caps and floors stay in the configuration",
    story=(
        "Sources are built from their names, lengths and weights; what their bounds are is read, "
        "shown, and not handed on. Everything that compares shares with bounds compares them with "
        "none, and is content."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def bounds_left_behind():
    original = mixing.sources_of

    def unbounded(entries, spans):
        return [replace(s, cap=1.0, floor=0.0) for s in original(entries, spans)]

    with swap(mixing, "sources_of", unbounded):
        yield


@plant(
    "curriculum.capped-source-drawn",
    gate="curriculum.order",
    title="A cap of zero is no cap",
    story=(
        "A cap of 0.0 is false, so the line that applies caps where there is one passes over it. "
        "The source that was taken out is read as if nobody had said a word."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def capped_source_drawn():
    original = bandit.shares

    def truthy(sources):
        return original([replace(s, cap=s.cap or 1.0) for s in sources])

    with swap(bandit, "shares", truthy):
        yield


@plant(
    "curriculum.warmup-forgotten",
    gate="curriculum.order",
    title="The warm-up is declared and never read",
    story=(
        "The key is in the configuration, in the log and in the record. Nothing reads it. "
        "Repetitive sources are there from the first step, when a model is most easily taught to "
        "repeat."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def warmup_forgotten():
    with swap(bandit, "in_warmup", lambda sources, listed: list(sources)):
        yield


@plant(
    "curriculum.warmup-outlasts-its-rows",
    gate="curriculum.order",
    title="A batch over the end of the warm-up belongs to it as a whole",
    story=(
        "Shares are worked out once for each call that asks for rows. The call that reaches "
        "beyond the warm-up keeps the shares of its first row. How many rows are of the warm-up "
        "then depends on the size of a micro-batch, and so does every row after it."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def warmup_outlasts_its_rows():
    original = bandit.Bandit.decide

    def whole_call(self, before, after):
        rows, inside = self._warmup_rows, before < self._warmup_rows
        self._warmup_rows = after if inside else rows
        original(self, before, after)
        self._warmup_rows = rows

    with swap(bandit.Bandit, "decide", whole_call):
        yield


@plant(
    "curriculum.head-of-source-only",
    gate="curriculum.order",
    title="A source is truncated instead of sampled",
    story=(
        "To meet its share, a source gives its first rows again and again. The share comes out "
        "exactly, and the rest of the source is never read."
    ),
    sources=(
        "https://github.com/allenai/OLMo-core/issues/147",
        "https://github.com/allenai/OLMo-core/issues/316",
    ),
)
def head_of_source_only():
    original = bandit.locate

    def first_rows(sources, source, k, seed, shuffle):
        return original(
            [replace(s, n_windows=max(1, s.n_windows // 4)) for s in sources],
            source,
            k,
            seed,
            shuffle,
        )

    with swap(bandit, "locate", first_rows):
        yield


@plant(
    "curriculum.reward-from-own-loss",
    gate="curriculum.reward",
    title="The bandit rewards what is easy",
    story=(
        "A source is rewarded when its own loss falls. Lists and templates fall fastest, so they "
        "are read most, so they fall further. The loss looks better while it happens, and the "
        "samples become lists."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def reward_from_own_loss():
    def own(self, losses):
        name = self.sources[self.focus].name
        return self.last_losses[name] - losses[name]

    with swap(bandit.Bandit, "drop", own):
        yield


@plant(
    "curriculum.reward-unnormalised",
    gate="curriculum.reward",
    title="Rewards drown exploration",
    story=(
        "Rewards are loss drops times a thousand, and the bonus for a source not tried lately is "
        "about one. The first source that was lucky keeps the focus, and the rest of the formula "
        "never matters."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def reward_unnormalised():
    def thousandfold(self, drop):
        self.n_drops += 1
        self.pulls[self.focus] += 1
        self.rewards[self.focus] += max(0.0, drop) * 1000
        return max(0.0, drop) * 1000

    with swap(bandit.Bandit, "_learn", thousandfold):
        yield


@plant(
    "curriculum.never-looks-back",
    gate="curriculum.reward",
    title="The bandit never looks back",
    story=(
        "The bonus for what was not tried lately is lost, so the source with the best mean keeps "
        "the focus. Each source was tried once, and the useful one has nearly all turns, which "
        "looks like a fast learner. When it has given what it had, the turns go on."
    ),
    sources=("https://arxiv.org/abs/0805.3415",),
)
def never_looks_back():
    def greedy(self):
        candidates = [i for i in self.arms if self.sources[i].weight > 0]
        untried = [i for i in candidates if self.pulls[i] == 0]
        return untried[0] if untried else max(candidates, key=lambda i: (self._means()[i], -i))

    with swap(bandit.Bandit, "_choose", greedy):
        yield


@plant(
    "curriculum.rewards-never-fade",
    gate="curriculum.reward",
    title="Turns are forgotten, and what they earned is not",
    story=(
        "The counts of turns are discounted, the sums of rewards are not. The mean of a source "
        "that was tried often grows beyond every reward there is, and it keeps the focus for what "
        "it did long ago."
    ),
    sources=("https://arxiv.org/abs/0805.3415",),
)
def rewards_never_fade():
    original = bandit.Bandit._learn

    def remembering(self, drop):
        before = self.rewards.copy()
        reward = original(self, drop)
        self.rewards += (1 - self.cfg.discount) * before
        return reward

    with swap(bandit.Bandit, "_learn", remembering):
        yield


@plant(
    "curriculum.trend-is-merit",
    gate="curriculum.reward",
    title="What every turn brings is merit",
    story=(
        "Drops of the loss are divided by their spread, and their mean is not taken out. While a "
        "model learns every loss falls in every turn, so all rewards are the best there is, all "
        "sources look alike, and the turns go round. No number looks wrong."
    ),
    sources=("https://arxiv.org/abs/0805.3415",),
)
def trend_is_merit():
    original = bandit.Bandit._learn

    def uncentred(self, drop):
        reward = original(self, drop)
        self.drop_mean = 0.0
        return reward

    with swap(bandit.Bandit, "_learn", uncentred):
        yield


@plant(
    "curriculum.focus-shuns",
    gate="curriculum.reward",
    title="The source in focus is the one that is not read",
    story=(
        "One sign is wrong where a choice becomes shares: the focus is taken off the source that "
        "has it. The log of turns shows a bandit that learns well and chooses right. The rows are "
        "those of the others, and caps and floors hold all the while."
    ),
    sources=("https://arxiv.org/abs/0805.3415",),
)
def focus_shuns():
    original = bandit.Bandit.target

    def away(self, position):
        share = original(self, position)
        rest = np.where(np.arange(len(share)) == self.focus, 0.0, self._base_shares)
        return (
            bandit.shares([replace(s, weight=float(w)) for s, w in zip(self.sources, rest)])
            if self.last_losses
            else share
        )

    with swap(bandit.Bandit, "target", away):
        yield


@plant(
    "curriculum.shares-drift-together",
    gate="curriculum.reward",
    title="Shares are met half",
    story=(
        "A drawn row costs its source two credits and not one. The credits of all fall together, "
        "and every source has half of its share and an even part of the rest. Each is within its "
        "cap and floor, so nothing is wrong but the mixture."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/147",),
)
def shares_drift_together():
    original = bandit.Bandit.target

    def evened(self, position):
        share = original(self, position)
        return np.where(share > 0, share / 2 + 0.5 / max(1, (share > 0).sum()), 0.0)

    with swap(bandit.Bandit, "target", evened):
        yield


@plant(
    "curriculum.zombie-arm",
    gate="curriculum.state",
    title="The saved state revives a source",
    story=(
        "A source is taken out of the configuration. The saved state of the bandit still has it, "
        "with the weight it earned, and loading merges it back into the pool. It takes turns, "
        "although there is nothing of it to read."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def zombie_arm():
    original = bandit.Bandit.load_state_dict

    def merging(self, state):
        dropped = original(self, state)
        for name in dropped:
            at = (
                [s.name for s in self.sources].index(name)
                if name in [s.name for s in self.sources]
                else len(self.sources)
            )
            revived = replace(self.sources[0], name=name, cap=1.0, weight=1.546)
            self.sources = (*self.sources[:at], revived, *self.sources[at + 1 :])
            self.arms = [i for i, s in enumerate(self.sources) if s.cap > 0]
            for array in ("drawn", "credit", "pulls", "rewards"):
                former = getattr(self, array)
                setattr(
                    self,
                    array,
                    np.append(former, 0).astype(former.dtype) if at == len(former) else former,
                )
            self._base_shares = bandit.shares(self.sources)
        return dropped

    with swap(bandit.Bandit, "load_state_dict", merging):
        yield


@plant(
    "curriculum.state-forgets-positions",
    gate="curriculum.state",
    title="A restored mixture begins its sources anew",
    story=(
        "The checkpoint knows how many rows were read in all, and not how many of each source. "
        "After every restart each source begins at its first window again. The loss takes a step "
        "down at each restart, which looks like progress."
    ),
    sources=(
        "https://github.com/paiml/entrenar/issues/294",
        "https://github.com/huggingface/accelerate/issues/2016",
    ),
)
def state_forgets_positions():
    original = bandit.Bandit.load_state_dict

    def from_the_top(self, state):
        dropped = original(self, state)
        self.drawn = np.zeros_like(self.drawn)
        return dropped

    with swap(bandit.Bandit, "load_state_dict", from_the_top):
        yield


@plant(
    "curriculum.state-forgets-spread",
    gate="curriculum.state",
    title="A restored bandit has forgotten how much losses vary",
    story=(
        "Positions, pulls and rewards come back, and mean and spread of the drops begin at "
        "nothing. The next rows are the right ones, so a comparison of what is read after the "
        "restart is equal. The turns after that are judged by another measure, and other sources "
        "win."
    ),
    sources=("founding note: the twenty-second training run",),
)
def state_forgets_spread():
    original = bandit.Bandit.load_state_dict

    def half(self, state):
        return original(self, {**state, "drop_mean": 0.0, "drop_var": 0.0, "n_drops": 0})

    with swap(bandit.Bandit, "load_state_dict", half):
        yield


@plant(
    "curriculum.state-forgets-warmup",
    gate="curriculum.state",
    title="A turn of the warm-up is credited after a restart",
    story=(
        "What a turn of the warm-up did is no merit of the source in focus, which was not read. "
        "The mark that says so is not saved. A run that restarts there credits or blames a source "
        "for rows of others."
    ),
    sources=("founding note: the twenty-second training run",),
)
def state_forgets_warmup():
    original = bandit.Bandit.load_state_dict

    def unmarked(self, state):
        return original(self, {**state, "in_warmup": False})

    with swap(bandit.Bandit, "load_state_dict", unmarked):
        yield


@plant(
    "curriculum.ledger-names-another-source",
    gate="curriculum.draws",
    title="The ledger enters rows under the wrong source",
    story=(
        "The list of sources is sorted in one place and not in another, so the ledger's second "
        "column is that of a neighbour. Every share in every report is another source's share."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/147",),
)
def ledger_names_another_source():
    original = reader.as_batch

    def neighbours(rows, draws, before, after):
        n = max(2, int(draws.sources.max()) + 1)
        return original(rows, replace(draws, sources=(draws.sources + 1) % n), before, after)

    with swap(reader, "as_batch", neighbours):
        yield


@plant(
    "curriculum.floor-starved",
    gate="curriculum.draws",
    title="One source takes all rows",
    story=(
        "The first source is read alone until it is used up, and the floors of the others are to "
        "be met later, on average. Later is very late: for thousands of rows there is one kind of "
        "text."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def floor_starved():
    def first_alone(self, position):
        return (np.arange(len(self.sources)) == 0).astype(float)

    with swap(bandit.Bandit, "target", first_alone):
        yield


@plant(
    "curriculum.shock-at-switch",
    gate="curriculum.gradient-shock",
    title="A change of sources shakes the model",
    story=(
        "Whenever the source changes, the first batch of the new one gives a gradient a hundred "
        "times the usual. Without clipping one such step can push a model into a corner it does "
        "not leave; with it, the step is noise."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def shock_at_switch():
    original, former = steps.accumulate, [()]

    def shaken(state, batches):
        result = original(state, batches)
        mix = tuple(np.bincount([s for b in batches for s in b.sources or (0,)], minlength=8))
        if former[0] not in ((), mix) and state.step >= 12:
            touch()
            for gradient in opt.gradients(state.model):
                gradient.mul_(100)
        former[0] = mix
        return result

    with swap(steps, "accumulate", shaken, counted=False):
        yield
