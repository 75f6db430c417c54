"""Plants in mixtures of experts: balance that is not felt, cannot be felt or can be cheated, and
weights of another convention.
"""

import torch

from stackproof.model import moe
from stackproof.museum.plant import swap


def weights_not_renormalised():
    original = moe.route

    def as_they_are(logits_RE, top_k, selection_bias_E=None):
        experts_Rk, _, probs_RE = original(logits_RE, top_k, selection_bias_E)
        return experts_Rk, probs_RE.gather(1, experts_Rk), probs_RE

    with swap(moe, "route", as_they_are):
        yield


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


def drops_uncounted():
    original = moe.dispatch

    def one_fewer(x_RD, experts_Rk, weights_Rk, experts, capacity=None, row_R=None):
        _, load_E, dropped = original(x_RD, experts_Rk, weights_Rk, experts, capacity, row_R)
        y_RD, _, _ = original(x_RD, experts_Rk, weights_Rk, experts, max(0, int(load_E.max()) - 1))
        return y_RD, load_E, dropped

    with swap(moe, "dispatch", one_fewer):
        yield


def balance_left_out():
    original = moe.balance

    def cut_off(probs_RE, experts_Rk, row_R=None):
        return original(probs_RE, experts_Rk, row_R).detach()

    with swap(moe, "balance", cut_off):
        yield


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


def balance_cheated():
    original = moe.balance

    def normalised_again(probs_RE, experts_Rk, row_R=None):
        return original(probs_RE / (probs_RE.sum(-1, keepdim=True) + 0.1), experts_Rk, row_R)

    with swap(moe, "balance", normalised_again):
        yield


def bias_sign_flipped():
    original = moe.update_selection_bias

    def flipped(model, loads_LE, rate):
        original(model, loads_LE, -rate)

    with swap(moe, "update_selection_bias", flipped):
        yield


def bias_per_micro_batch():
    original = moe.MixtureOfExperts.forward

    def eager(self, x_BTD, context=None):
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
        return original(self, x_BTD, context)

    with swap(moe.MixtureOfExperts, "forward", eager):
        yield


def router_reads_the_mean():
    original = moe.route

    def pooled(logits_RE, top_k, selection_bias_E=None):
        return original(
            logits_RE.mean(0, keepdim=True).expand_as(logits_RE), top_k, selection_bias_E
        )

    with swap(moe, "route", pooled):
        yield
