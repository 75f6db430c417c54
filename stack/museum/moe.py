"""Plants in mixtures of experts: balance that is not felt, cannot be felt or can be cheated, and
weights of another convention.
"""

import torch

from stackproof.model import moe
from stackproof.museum.plant import plant, swap


@plant(
    "moe.weights-not-renormalised",
    gate="moe.dispatch-parity",
    title="Weights keep the share of experts nobody asked",
    story=(
        "The probabilities of the chosen experts are used as they are, without dividing by their "
        "sum. What the layer writes is too small by the share of all the others. From scratch the "
        "model learns around it; a checkpoint moved between two such conventions is broken."
    ),
    sources=("https://github.com/pytorch/torchtitan/issues/2319",),
)
def weights_not_renormalised():
    original = moe.route

    def as_they_are(logits_RE, top_k, selection_bias_E=None):
        experts_Rk, _, probs_RE = original(logits_RE, top_k, selection_bias_E)
        return experts_Rk, probs_RE.gather(1, experts_Rk), probs_RE

    with swap(moe, "route", as_they_are):
        yield


@plant(
    "moe.bias-in-the-weights",
    gate="moe.dispatch-parity",
    title="The selection bias leaks into the weights",
    story=(
        "The bias is meant to enter the choice of experts and nothing else. Here the biased "
        "scores are also what the outputs are weighted with. Balance now changes what the model "
        "says, and the router's probabilities are no longer what they claim."
    ),
    sources=(
        "https://arxiv.org/abs/2408.15664",
        "https://github.com/pytorch/torchtitan/issues/3686",
    ),
)
def bias_in_the_weights():
    original = moe.route

    def biased(logits_RE, top_k, selection_bias_E=None):
        experts_Rk, weights_Rk, probs_RE = original(logits_RE, top_k, selection_bias_E)
        if selection_bias_E is None:
            return experts_Rk, weights_Rk, probs_RE
        scores_Rk = (probs_RE + selection_bias_E).gather(1, experts_Rk)
        return (
            experts_Rk,
            scores_Rk / scores_Rk.sum(-1, keepdim=True) if top_k > 1 else scores_Rk,
            probs_RE,
        )

    with swap(moe, "route", biased):
        yield


@plant(
    "moe.drops-uncounted",
    gate="moe.dispatch-parity",
    title="Dropped tokens that nobody counts",
    story=(
        "Each expert takes one token fewer than it has room for, and the one it leaves out is not "
        "entered as dropped. Its place in the output is zero. The count says that all tokens "
        "arrived."
    ),
    sources=("https://arxiv.org/abs/2101.03961",),
)
def drops_uncounted():
    original = moe.dispatch

    def one_fewer(x_RD, experts_Rk, weights_Rk, experts, capacity=None, row_R=None):
        _, load_E, dropped = original(x_RD, experts_Rk, weights_Rk, experts, capacity, row_R)
        y_RD, _, _ = original(x_RD, experts_Rk, weights_Rk, experts, max(0, int(load_E.max()) - 1))
        return y_RD, load_E, dropped

    with swap(moe, "dispatch", one_fewer):
        yield


@plant(
    "moe.balance-left-out",
    gate="moe.balance-loss",
    title="The balance term is computed and not added",
    story=(
        "The term is there, it is logged, and it is cut from the graph on its way into the sum. "
        "The loss falls as before. The router sends more and more tokens to the experts that "
        "already know most."
    ),
    sources=(
        "https://github.com/pytorch/torchtitan/issues/1246",
        "https://github.com/intelligent-machine-learning/dlrover/issues/1311",
    ),
)
def balance_left_out():
    original = moe.balance

    def cut_off(probs_RE, experts_Rk, row_R=None):
        return original(probs_RE, experts_Rk, row_R).detach()

    with swap(moe, "balance", cut_off):
        yield


@plant(
    "moe.balance-insensitive",
    gate="moe.balance-loss",
    title="A balance term that never changes",
    story=(
        "Shares and probabilities meet in shapes that broadcast, and the sum runs over both. "
        "Every share is multiplied by every mean probability, and shares and probabilities each "
        "add up to 1: the term is constant, whatever the router does."
    ),
    sources=(
        "https://github.com/mindspore-ai/hyper-parallel/issues/752",
        "https://github.com/paiml/aprender/issues/2162",
        "https://github.com/NVIDIA/Megatron-LM/issues/1617",
    ),
)
def balance_insensitive():
    def broadcast(probs_RE, experts_Rk, row_R=None):
        n_experts = probs_RE.shape[1]
        share_E = (
            torch.bincount(experts_Rk.flatten(), minlength=n_experts).to(probs_RE.dtype)
            / experts_Rk.numel()
        )
        return (share_E[:, None] * probs_RE.mean(0)[None, :]).sum()

    with swap(moe, "balance", broadcast):
        yield


@plant(
    "moe.balance-cheated",
    gate="moe.balance-loss",
    title="A balance term below its bound",
    story=(
        "The probabilities are normalised once more, with a small number added to the sum against "
        "division by zero. It is not small enough. By making its scores tiny the router pays less "
        "than for perfect balance, and keeps its favourites."
    ),
    sources=("https://github.com/NVIDIA/Megatron-LM/issues/1545",),
)
def balance_cheated():
    original = moe.balance

    def normalised_again(probs_RE, experts_Rk, row_R=None):
        return original(probs_RE / (probs_RE.sum(-1, keepdim=True) + 0.1), experts_Rk, row_R)

    with swap(moe, "balance", normalised_again):
        yield


@plant(
    "moe.bias-sign-flipped",
    gate="moe.bias-balance",
    title="The bias feeds the favourite",
    story=(
        "The step of the selection bias has the wrong sign: an expert that takes too many tokens "
        "is made more attractive. Whatever imbalance there is at the start grows until a few "
        "experts do all the work."
    ),
    sources=(
        "https://github.com/pytorch/torchtitan/issues/3686",
        "https://arxiv.org/abs/2408.15664",
    ),
)
def bias_sign_flipped():
    original = moe.update_selection_bias

    def flipped(model, loads_LE, rate):
        original(model, loads_LE, -rate)

    with swap(moe, "update_selection_bias", flipped):
        yield


@plant(
    "moe.bias-per-micro-batch",
    gate="moe.bias-balance",
    title="The bias moves with every forward",
    story=(
        "The update sits where the loads are counted, so it runs for each micro-batch. With "
        "accumulation the bias is several times as fast as declared, and it moves while one and "
        "the same update is still being computed."
    ),
    sources=("https://github.com/pytorch/torchtitan/pull/1304",),
)
def bias_per_micro_batch():
    original = moe.MixtureOfExperts.forward

    def eager(self, x_BTD, reading=None):
        if self.training and self.selection_bias is not None:
            with torch.no_grad():
                probs_RE = self.router(x_BTD.flatten(0, -2)).softmax(-1)
                chosen_Rk = (probs_RE + self.selection_bias).topk(2).indices
                load_E = torch.bincount(
                    chosen_Rk.flatten(), minlength=len(self.selection_bias)
                ).double()
                self.selection_bias += 1e-3 * torch.sign(load_E.mean() - load_E).to(
                    self.selection_bias
                )
        return original(self, x_BTD, reading)

    with swap(moe.MixtureOfExperts, "forward", eager):
        yield


@plant(
    "moe.router-reads-the-mean",
    gate="moe.router-collapse",
    title="One choice for the whole batch",
    story=(
        "The router's scores are averaged over the tokens before the choice, by a mean over the "
        "wrong axis. All tokens take the same experts, and the others are never used or trained. "
        "Nothing crashes: the model is a dense one, at a multiple of the price."
    ),
    sources=(
        "https://github.com/pytorch/torchtitan/issues/1246",
        "https://github.com/intelligent-machine-learning/dlrover/issues/1311",
    ),
)
def router_reads_the_mean():
    original = moe.route

    def pooled(logits_RE, top_k, selection_bias_E=None):
        return original(
            logits_RE.mean(0, keepdim=True).expand_as(logits_RE), top_k, selection_bias_E
        )

    with swap(moe, "route", pooled):
        yield
