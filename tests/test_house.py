"""The house: imports point one way, and what the README says can be copied works on its own."""

import ast
import functools
import shutil

import pytest
from conftest import ROOT, run_script

FILES = sorted(p.stem for p in ROOT.glob("*.py"))

# What each file may import of ours, anywhere in it. Every name stands below those that import it.
MAY_IMPORT = {
    "checkpoints": set(),
    "training": {"checkpoints"},
    "critters": set(),
    "files": set(),
    "layouts": {"files", "critters"},
    "download": {"files", "layouts"},
    "clusters": set(),
    "dataset": {"checkpoints", "training", "files", "layouts", "download", "critters"},
    "control": {"ops", "checkpoints", "training"},
    "encoder": {"ops", "checkpoints", "training", "layouts", "dataset"},
    "classifier": {"checkpoints", "training", "layouts", "dataset", "encoder", "clusters"},
    "gan": {"ops", "checkpoints", "training", "layouts", "dataset", "encoder", "classifier"},
    "trained": {"checkpoints", "training", "dataset", "encoder", "classifier", "gan", "control"},
    "metrics": {"ops", "trained"},
    "latents": {"checkpoints", "training", "critters", "dataset", "control", "gan"},
    "page": {"gan", "latents"},
    "explore": {
        "checkpoints",
        "training",
        "files",
        "dataset",
        "encoder",
        "gan",
        "trained",
        "metrics",
        "latents",
        "page",
    },
}
AT_THE_TOP = {
    "encoder": {"checkpoints", "training"},
    "classifier": {"checkpoints", "training"},
    "gan": {"ops", "checkpoints", "training"},
    "metrics": {"ops"},
}


def imported(tree: ast.AST) -> set[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names} & {*FILES, "ops"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    assert imported(tree) <= MAY_IMPORT[name]
    if name in AT_THE_TOP:  # the rest is for its command alone: a copy does without
        functions = (ast.FunctionDef, ast.ClassDef)
        top = ast.Module([node for node in tree.body if not isinstance(node, functions)], [])
        assert imported(top) == AT_THE_TOP[name]
    order = list(MAY_IMPORT)
    assert all(order.index(other) < order.index(name) for other in MAY_IMPORT[name] - {"ops"})


@functools.cache
def defined(name: str) -> set[str]:
    """The names at the top of one of our modules, those in its `if`s and `try`s too."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    names, nodes = {"__name__", "__file__", "__doc__"}, list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            nodes += ast.iter_child_nodes(node)
    return names | {p.stem for p in path.parent.glob("*.py")} if path.name == "__init__.py" else names


USERS = sorted(
    str(p.relative_to(ROOT)) for part in (".", "bench", "experiments", "ops") for p in (ROOT / part).glob("*.py")
)


@pytest.mark.parametrize("name", USERS)
def test_names_taken_from_our_modules_exist(name):
    """Benchmarks and experiments too, which no other test runs to the end."""
    tree, modules, missing = ast.parse((ROOT / name).read_text()), {}, []
    package = str((ROOT / name).parent.relative_to(ROOT))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name: a.name for a in node.names if a.name.split(".")[0] in {*FILES, "ops"}}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, [package if node.level else "", node.module]))
            if source.split(".")[0] in {*FILES, "ops", "bench", "experiments"}:
                missing += [f"{source}.{a.name}" for a in node.names if a.name not in defined(source)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            source = modules[node.value.id]
            missing += [f"{source}.{node.attr}"] if node.attr not in defined(source) else []
    assert not missing


def test_the_image_reader_is_one():
    """metrics.py works alone, so it repeats the reader of files.py: word for word."""
    start, end = "# --- the image reader", "# --- end of the image reader"
    texts = [(ROOT / name).read_text() for name in ("files.py", "metrics.py")]
    blocks = [text[text.index(start) : text.index(end)].partition("\n")[2] for text in texts]
    assert blocks[0] == blocks[1] and "def read_image" in blocks[0]


def test_ops_import_nothing_of_ours():
    for path in (ROOT / "ops").glob("*.py"):
        assert not imported(ast.parse(path.read_text())) - {"ops"}, path


# Files to copy together, and a program that uses them.
COPIES = {
    "ops": "from ops import bias_lrelu; print(bias_lrelu(torch.ones(2, 3), torch.zeros(3)).shape)",
    "encoder training checkpoints": """
        import encoder
        views = encoder.augment(torch.rand(8, 3, 32, 32) * 2 - 1)
        net = encoder.Encoder("resnet18", "imagenet")
        loss = encoder.nt_xent(*net.projection(net(views)).split(4), 0.5)
        loss.backward()
        print(loss.shape)
        """,
    "classifier training checkpoints": """
        import classifier
        h, y = torch.randn(20, 5), torch.eye(2)[torch.arange(20) % 2]
        options = dict(batch=8, lr=1e-3, weight_decay=0, balance=True, seed=0)
        print(classifier.fit(h, y, True, options, epochs=1, first=None, state={}).weight.shape)
        """,
    "gan ops training checkpoints": """
        import gan, training
        run = training.Run(torch.device("cpu"), None, seed=0)
        options = gan.default_options(32, batch=4, disc="patch", loss="lsgan", reg_every=0)
        trainer = gan.Trainer(options, run, torch.eye(3), "one-hot")
        trainer.iteration(0, torch.rand(4, 3, 32, 32) * 2 - 1, torch.eye(3)[[0, 1, 2, 0]])
        print(trainer.ema(torch.eye(3), torch.randn(3, trainer.ema.latent_width)).shape)
        """,
    "dataset layouts files download critters training checkpoints": """
        import dataset
        print(torch.Size(dataset.square(dataset.Image.new("RGB", (40, 30)), 16).shape))
        """,
    "metrics": """
        import metrics
        print(torch.tensor([metrics.tsne_chamfer(*torch.randn(2, 40, 8), 0, torch.device("cpu"))]).shape)
        """,
}  # fmt: skip


@pytest.mark.parametrize("names", COPIES)
def test_copies_work_alone(names, tmp_path):
    for name in names.split():
        if name == "ops":
            shutil.copytree(ROOT / "ops", tmp_path / "ops")
        else:
            shutil.copy(ROOT / f"{name}.py", tmp_path)
    lines = COPIES[names].splitlines()
    (tmp_path / "program.py").write_text(
        "import torch\n" + "\n".join(line[8:] if line[:8].isspace() else line for line in lines)
    )
    done = run_script(tmp_path / "program.py", cwd=tmp_path)
    assert done.returncode == 0 and "torch.Size" in done.stdout, done.stderr
