"""What `import entropy_po` pulls in, and what works without what; each in a process of its own."""

import os
import subprocess
import sys
import textwrap

SMALL = """
import torch
logits = torch.randn(4, 50, requires_grad=True)
labels = torch.tensor([1, 2, 3, -100])
hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8).bfloat16().float().requires_grad_()
def run():
    stats = entropy_po.token_stats(logits, labels)
    other = entropy_po.linear_token_stats(hidden, weight, labels)
    (stats.logps + stats.entropy + other.logps + other.entropy).sum().backward()
    assert logits.grad.isfinite().all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    return stats
"""


def python(code, cwd=None, **env):
    """Run code in a fresh interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone(tmp_path):
    loaded = python(
        """
        import sys, torch
        before = set(sys.modules)
        import entropy_po
        print(*sorted({m for m in set(sys.modules) - before}))
        """,
        cwd=tmp_path,
    ).split()
    for name in ("triton", "transformers", "trl", "peft", "datasets", "scipy", "matplotlib"):
        assert not any(m == name or m.startswith(name + ".") for m in loaded), f"import entropy_po loads {name}"
    assert "entropy_po._C" not in loaded
    assert "entropy_po.reference" in loaded
    assert not any(m.startswith(("entropy_po.kernels", "entropy_po.trainer", "entropy_po.cli")) for m in loaded)


def test_works_with_everything_optional_blocked(tmp_path):
    python(
        """
        import sys
        for name in ("triton", "transformers", "trl", "peft", "datasets", "scipy", "matplotlib"):
            sys.modules[name] = None
        import entropy_po
        """
        + textwrap.indent(SMALL, " " * 8)
        + """
        run()
        assert "triton" not in entropy_po.available_backends()["cuda"]
        """,
        cwd=tmp_path,
    )


def test_without_the_core_it_warns_once_and_runs_on_torch(tmp_path):
    python(
        """
        import sys, warnings
        sys.modules["entropy_po._C"] = None
        import entropy_po
        """
        + textwrap.indent(SMALL, " " * 8)
        + """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(); logits.grad = hidden.grad = weight.grad = None; run()
            half = entropy_po.linear_token_stats(hidden.detach().bfloat16(), weight.detach().bfloat16(), labels)
        assert half.logps.isfinite().all()
        ours = [str(w.message) for w in caught if "entropy_po" in str(w.message)]
        assert len(ours) == 1, ours
        assert "plain torch" in ours[0] and "compiler" in ours[0], ours
        assert entropy_po.available_backends()["cpu"] == ["torch"]
        entropy_po.describe()
        try:
            entropy_po.token_stats(logits, labels, backend="cpp")
        except NotImplementedError as error:
            assert "backend='cpp'" in str(error) and "not built" in str(error), error
        else:
            raise SystemExit("an explicit backend fell back")
        """,
        cwd=tmp_path,
    )


def test_the_environment_chooses_among_backends_and_describe_says_so(tmp_path):
    code = """
        import torch, warnings, entropy_po
        from entropy_po import tiles
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tiles.resolve_backend(None, torch.device("cpu")) is tiles.Backend.TORCH
        assert entropy_po.available_backends()["cpu"][0] == "torch"
        assert entropy_po.describe()["override"] == "torch"
        if tiles.compiled_core():
            assert tiles.resolve_backend("cpp", torch.device("cpu")) is tiles.Backend.CPP
        """
    python(code, cwd=tmp_path, ENTROPY_PO_BACKEND="torch")
    one_that_serves_other_devices = """
        import torch, entropy_po
        from entropy_po import tiles
        assert tiles.default_backend("cpu") is not tiles.Backend.CUDA
        cuda = entropy_po.available_backends()["cuda"]
        assert cuda[0] == "cuda" or "cuda" not in cuda
        """
    python(one_that_serves_other_devices, cwd=tmp_path, ENTROPY_PO_BACKEND="cuda")
    unusable = """
        import sys
        sys.modules["triton"] = None
        from entropy_po import tiles
        try:
            tiles.default_backend("cuda")
        except NotImplementedError as error:
            assert "ENTROPY_PO_BACKEND='triton' cannot be used" in str(error), error
        else:
            raise SystemExit("the backend asked for was passed over")
        """
    python(unusable, cwd=tmp_path, ENTROPY_PO_BACKEND="triton")
    unknown = """
        from entropy_po import tiles
        try:
            tiles.default_backend("cpu")
        except ValueError as error:
            assert "ENTROPY_PO_BACKEND='cude' is not one of" in str(error), error
        else:
            raise SystemExit("an unknown name was passed over")
        """
    python(unknown, cwd=tmp_path, ENTROPY_PO_BACKEND="cude")


def test_backends_are_left_out_by_name(tmp_path):
    code = """
        import warnings
        from entropy_po import available_backends, tiles
        warnings.simplefilter("ignore")
        assert available_backends()["cpu"] == ["torch"] and "triton" not in available_backends()["cuda"]
        assert tiles.default_backend("cpu") is tiles.Backend.TORCH
        assert tiles.unavailable_reason(tiles.Backend.CPP) == "ENTROPY_PO_WITHOUT names it"
        """
    python(code, cwd=tmp_path, ENTROPY_PO_WITHOUT="cpp,triton")
    for wrong in ("cude", "cpp,torch"):
        code = """
            from entropy_po import available_backends
            try:
                available_backends()
            except ValueError as error:
                assert "is not one of ['cpp', 'triton', 'cuda']" in str(error), error
            else:
                raise SystemExit("an unknown name was passed over")
            """
        python(code, cwd=tmp_path, ENTROPY_PO_WITHOUT=wrong)


def test_operators_exist_after_import_before_any_call(tmp_path):
    python(
        """
        import torch, entropy_po
        for name in ("token_stats", "token_stats_backward", "token_stats_backward_",
                     "linear_token_stats", "linear_token_stats_backward"):
            assert hasattr(torch.ops.entropy_po, name), name
        """,
        cwd=tmp_path,
    )


def test_public_names_are_those_of_all():
    import entropy_po

    for name in entropy_po.__all__:
        assert getattr(entropy_po, name) is not None
    assert {"EntropyObjective", "TokenStats", "token_stats", "linear_token_stats"} <= set(entropy_po.__all__)
