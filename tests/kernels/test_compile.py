"""That the kernels compile for GPUs.
The interpreter runs what a compiler may refuse; a compiler needs no GPU.

Each launch is watched in the interpreter, and another process compiles the kernel for its very
arguments down to machine code.
"""

import json
import subprocess
import sys

import pytest
import torch

from stackproof.kernels.triton import flash_attention, linear_cross_entropy, rms_norm, rope, swiglu

# what one program may use, by NVIDIA's compute capability
SHARED_BYTES = {80: 166_912, 90: 232_448}
CODE = """
import json, sys, warnings
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

warnings.simplefilter("ignore")
path = lambda text: tuple(int(i) for i in text.split("."))
nested = lambda x: tuple(map(nested, x)) if isinstance(x, list) else x
for launch in json.load(sys.stdin):
    function = getattr(import_module(launch["module"]), launch["kernel"])
    source = ASTSource(
        function,
        signature={k: nested(v) for k, v in launch["signature"].items()},
        constexprs={path(k): v for k, v in launch["constants"].items()},
        attrs={path(k): [["tt.divisibility", 16]] for k in launch["aligned"]},
    )
    made = triton.compile(source, target=GPUTarget("cuda", launch["capability"], 32), options=launch["options"])
    print(json.dumps([launch["kernel"], launch["capability"], made.metadata.shared, len(made.asm["cubin"])]), flush=True)
"""  # noqa: E501
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the other tests compile the kernels"
)


class Watch:
    """Launches as a compiler wants to hear of them."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpretedFunction

        self.launches: list[dict] = []
        run = InterpretedFunction.run

        def watched(function, *args, grid, warmup, **options):
            self.note(function, args, options)
            return run(function, *args, grid=grid, warmup=warmup, **options)

        monkeypatch.setattr(InterpretedFunction, "run", watched)

    def note(self, function, args, options) -> None:
        names = function.arg_names
        given = dict(zip(names, args)) | {k: v for k, v in options.items() if k in names}
        launch = {
            "module": function.fn.__module__,
            "kernel": function.__name__,
            "signature": {},
            "constants": {},
            "aligned": [],
        }
        launch["options"] = {k: v for k, v in options.items() if k not in names}
        for i, name in enumerate(names):
            constant = "constexpr" in str(function.fn.__annotations__.get(name, ""))
            launch["signature"][name] = self.kind(launch, given[name], str(i), constant)
        self.launches.append(launch)

    def kind(self, launch, value, path, constant):
        """The type of an argument, as triton specialises it: None, 1 and constants are compiled in,
        multiples of 16 are known as such.
        """
        if isinstance(value, tuple):
            return [self.kind(launch, v, f"{path}.{j}", constant) for j, v in enumerate(value)]
        if constant or value is None or (isinstance(value, int) and value == 1):
            launch["constants"][path] = value
            return "constexpr"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0:
            launch["aligned"].append(path)
        match value:
            case torch.Tensor():
                name = {
                    torch.bfloat16: "bf16",
                    torch.float16: "fp16",
                    torch.float32: "fp32",
                    torch.int64: "i64",
                    torch.int32: "i32",
                }
                return "*" + name[value.dtype]
            case int():
                return "i32" if -(2**31) <= value < 2**31 else "i64"
            case float():
                return "fp32"


def heads(dtype, H, S=32):
    return [torch.randn(1, S, 2, H).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def launch_all():
    """Every kernel at least once, with what makes the most of its branches."""
    flash_attention.attention(
        *heads(torch.bfloat16, 64), start_BS=torch.zeros(1, 32, dtype=torch.int64), window=20
    ).sum().backward()
    q, k, v = heads(torch.float16, 32)  # one query of one head: every count is 1 and compiled in
    flash_attention.attention(q[:, :1, :1], k[:, :1], v[:, :1], window=1).sum().backward()
    x, weight, residual = (torch.randn(n).requires_grad_() for n in ((3, 64), (64,), (3, 64)))
    sum(y.sum() for y in rms_norm.rms_norm(x, weight, 1e-5, residual)).backward()
    rms_norm.rms_norm(x, weight, 1e-5).sum().backward()
    rope.rope(
        heads(torch.bfloat16, 64)[0], torch.ones(1, 1, 32, 32), torch.ones(1, 1, 32, 32)
    ).sum().backward()
    swiglu.swiglu(x, residual).sum().backward()
    sum(
        linear_cross_entropy.linear_cross_entropy(
            x, torch.randn(99, 64), torch.arange(3), softcap=9.0, z_loss=0.1
        )
    ).backward()
    linear_cross_entropy.linear_cross_entropy(x, torch.randn(99, 64), torch.arange(3))[0].backward()


def compiled(launches: list[dict]) -> list[list]:
    """Kernel, capability, bytes of shared memory and of code, of each launch;
    fails with the compiler's words.
    """
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(launches),
        text=True,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_and_fits(monkeypatch):
    watch = Watch(monkeypatch)
    launch_all()
    names = {(launch["module"], launch["kernel"]) for launch in watch.launches}
    # attention, rms_norm, rope, swiglu, linear_cross_entropy
    assert len(names) == 4 + 2 + 1 + 2 + 2
    launches = [launch | {"capability": 90} for launch in watch.launches] + [
        watch.launches[0] | {"capability": 80}
    ]
    made = compiled(launches)
    assert len(made) == len(launches)
    for kernel, capability, shared, code in made:
        assert code > 0 and shared <= SHARED_BYTES[capability], (kernel, capability, shared)


def test_what_does_not_compile_is_seen(monkeypatch):
    watch = Watch(monkeypatch)
    swiglu.swiglu(torch.ones(1, 1, 9), torch.ones(1, 1, 9))
    wrong = watch.launches[0] | {"capability": 90}
    # a number where the kernel loads through a pointer
    wrong["signature"] = wrong["signature"] | {"gate": "fp32"}
    with pytest.raises(AssertionError, match="pointer"):
        compiled([wrong])
