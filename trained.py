"""A trained run: its generator, its encoder and classifier, the images it was trained on, and what is asked of it.

    import metrics, trained
    run = trained.TrainedRun("runs/critters/gan.pt", metrics.start("auto", batch=64))
    h = run.embed(run.generated(1000, seed=0))                  # features of generated images, float32 [1000, F]

`metrics.py --network` and explore.py work with this. metrics.py compares two sets of images and works alone; this file
says what the two sets of a run are, through which networks they are seen, and what a run can be asked beyond them. So
metrics.py imports this file and not the other way round: `world`, the processes and their device, is a metrics.World.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import classifier as stage2
import control
import dataset
import encoder as stage1
import gan
import training

# The four measures of section 3, IS and Chamfer distance by the formulas of the published code.
OF_PAPER = {"fid", "is_published", "chamfer_sum", "accuracy"}  # what --protocol paper measures by default
# is_published takes 100,000 images, chamfer_sum a t-SNE of 12,800 points by scikit-learn for every seed.
SLOW = {"is_published", "chamfer_sum"}  # measured by default with --protocol paper only
# These need labels: they ask what images for a given y show.
OF_LABELS = {"accuracy", "diversity", "information"}

# ---------------------------------------------------------------------------------------------------------------------
# Sources of images, as metrics.Folder is one: `batches(blocks)` gives uint8 RGB [B, S, S, 3] for each block of indices.


class Real:
    """The images of a dataset.Dataset at the given indices."""

    def __init__(self, ds: dataset.Dataset, index: np.ndarray):
        self.ds, self.index = ds, index

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, blocks: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for block in blocks:
            yield torch.from_numpy(self.ds.images[self.index[block]])


class Generated:
    """Images that a gan.Network generates for the rows of y [N, Y]; image i depends on (seed, i) and y[i] only."""

    def __init__(self, net: gan.Network, n: int, y: Tensor | None, seed: int):
        self.net, self.n, self.y, self.seed = net, n, y, seed

    def __len__(self) -> int:
        return self.n

    def batches(self, blocks: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for block in blocks:
            # A prime far above the usual n: the images of two seeds are other ones.
            # By the image's number, not the batch's: neither batch size nor processes change an image.
            seeds = [(self.seed * 1_000_003 + int(i)) % 2**31 for i in block]
            yield training.to_uint8(self.net.generate(None if self.y is None else self.y[block], seeds))


# ---------------------------------------------------------------------------------------------------------------------
# Feature networks, as metrics.InceptionFeatures is one: uint8 images -> features float32 [B, D], log p(c|x) [B, C].


class EncoderFeatures:
    """Features h of a run's own encoder, and the class probabilities of its classifier if there is one.

    Images of another size (of two folders) are cropped to the central square and resized with antialiasing.
    """

    name, resize = "encoder", "none"

    def __init__(self, encoder: nn.Module, classifier: nn.Module | None, kind: str, size: int, device: torch.device):
        self.encoder, self.classifier = encoder.to(device).eval(), classifier and classifier.to(device)
        self.kind, self.size, self.device, self.dims = kind, size, device, encoder.features
        # Of the weights in the checkpoint: those of a gan.pt's encoder have been rewritten for this device.
        self.hash = getattr(encoder, "fingerprint", None) or checkpoints.fingerprint(encoder.state_dict())

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> their centres, float32 [B, 3, size, size] in [0, 255]."""
        # The central square, as dataset.square takes it where --squash does not ask for the whole.
        h, w, side = *images.shape[1:3], min(images.shape[1:3])
        x = images[:, (h - side) // 2 :, (w - side) // 2 :][:, :side, :side].permute(0, 3, 1, 2).float()
        return x if side == self.size else F.interpolate(x, (self.size,) * 2, mode="bilinear", antialias=True)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """uint8 images, or what `prepare` makes of them -> h [B, features]."""
        images = images.to(self.device)
        # The images of a folder come prepared, one by one as they are read; those of a run as bytes.
        x = self.prepare(images) if images.dtype == torch.uint8 else images
        # [-1, 1], as in its training.
        return self.encoder((x / 127.5 - 1).contiguous(memory_format=torch.channels_last)).float()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.embed(images)
        return h, None if self.classifier is None else log_probabilities(self.classifier(h), self.kind)


class JudgeFeatures:
    """Features of the independent judge of a run's data (control.Judge), and its probabilities of the run's labels."""

    name, resize = "judge", "none"

    def __init__(self, judge: control.Judge, kind: str, labels: int):
        self.judge, self.kind, self.labels, self.dims = judge, kind, labels, judge.DIMS
        self.hash = checkpoints.fingerprint(judge.state_dict())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h, logits = self.judge(images)
        # The judge may know labels that the run left out; the run's own come first.
        return h, log_probabilities(logits[:, : self.labels], self.kind)


def log_probabilities(logits: Tensor, kind: str) -> Tensor:
    """log p(c|x) float64 for IS; of independent attributes both sides, whose entropies add up."""
    logits = logits.double()
    # With p and 1 - p of each attribute side by side, the KL divergence of IS is the sum over attributes.
    return logits.log_softmax(1) if kind == "one-hot" else torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], 1)


def features_of(path: str, device: torch.device) -> EncoderFeatures:
    """The encoder of an encoder.pt, or of a gan.pt with its classifier."""
    try:
        # As an encoder.pt first; the error that a gan.pt raises here says that gan.py wrote it.
        state = checkpoints.load(path, "encoder")
        classifier, kind, size = None, "none", state["data"]["size"]
        with checkpoints.reading(path):
            network = stage1.build(state)
    except click.ClickException as error:
        if "written by gan.py" not in error.message:
            raise
        net = gan.load(path, device)
        network, classifier, kind, size = net.encoder, net.classifier, net.label_kind, net.size
        if network is None:
            raise click.ClickException(f"{path} holds no encoder: its run had no labels") from None
    return EncoderFeatures(network, classifier, kind, size, device)


# ---------------------------------------------------------------------------------------------------------------------
# The run.


class TrainedRun:
    """What `--network` names: the generator, its encoder and classifier, and the images it was trained on.

    net: the gan.Network. train: the dataset.Dataset of its images; images: that and the validation images, by split.
    features: EncoderFeatures, or None where there is no encoder. kind, names: of the labels y; 'none' and [] without.
    """

    def __init__(self, path: str, world, moved: str | None = None):
        self.net, self.folder, self.world = gan.load(path, world.device), checkpoints.run_folder(path), world
        self.kind, self.names, self.real = self.net.label_kind, self.net.label_names, self.net.real_labels
        data = self.net.data
        self.judges: dict[tuple[int, int], tuple] = {}  # what control.load_judge found, by seed and steps
        # Clusters of embeddings are not among the data set's labels: they are in classifier.pt.
        self.clusters = bool(self.names) and str(data["attributes"]).startswith("clusters")
        attributes = None if self.clusters or not self.names else data["attributes"]
        source = moved or data["data"]
        # Exports leave paths out, since they are made to be passed on.
        if not (moved or source in dataset.DATASETS or Path(source).is_absolute()):  # an export
            raise click.ClickException(f"{path} does not say where its images are: give --data")
        self.train = dataset.open_dataset(source, data["size"], "train", attributes, **dataset.same_images(data))
        self.images = {"train": self.train, "val": self.train.part("val")}
        info = dataset.read_info(self.train.pack)
        self.all_labels = info["classes"], info["attributes"]  # what the images have, whatever the run took
        self.protocol = self.net.options["protocol"]
        remedy = "give the run's folder the data it was trained on, or train again"
        # Measured against other images than it was trained on, or of another size, no number would mean anything.
        checkpoints.check_same(data, self.train.info(), ("fingerprint", "size"), path, remedy)

        # A run without labels carries no classifier, but stages 1 and 2 may lie beside it.
        encoder, classifier, kind = self.net.encoder, self.net.classifier, self.kind
        if classifier is None and (self.folder / "encoder.pt").exists():
            state = checkpoints.load(self.folder / "encoder.pt", "encoder")
            with checkpoints.reading(self.folder / "encoder.pt"):
                encoder = gan.frozen_encoder(stage1.build(state), data["size"], world.device)
            if (self.folder / "classifier.pt").exists():
                found = checkpoints.load(self.folder / "classifier.pt", "classifier")
                # Features of another encoder would mean nothing to this classifier.
                if found["encoder_hash"] == checkpoints.fingerprint(state["model"]):
                    with checkpoints.reading(self.folder / "classifier.pt"):
                        classifier, kind = stage2.build(found), found["data"]["label_kind"]
        self.features = encoder and EncoderFeatures(encoder, classifier, kind, data["size"], world.device)

    def labels(self, split: str) -> Tensor | None:
        """Labels of the real images, float32 [N, Y] in their order; None for clusters without their classifier.pt."""
        if not self.clusters:
            return torch.from_numpy(np.array(self.images[split].labels))
        path = self.folder / "classifier.pt"
        if not path.exists():
            return None
        state, own = checkpoints.load(path, "classifier"), self.net.classifier.state_dict()
        if checkpoints.fingerprint(state["model"]) != checkpoints.fingerprint(own):
            return None  # of other clusters
        return torch.eye(len(self.names))[state["assignments"][split].long()]

    def generated(self, n: int, seed: int, y: Tensor | None = None) -> Generated:
        """n images; y by default drawn from the labels of the training images as they occur together.

        Under the paper's protocol, classes are drawn uniformly and attributes are fair coins, as its code does.
        """
        # Each purpose has a stream of its own: 1 is y; 4 and 5 are below; others are in control.py and metrics.py.
        draw = np.random.default_rng([seed, 1])
        if y is None and self.real is not None:
            Y = self.real.shape[1]
            if self.protocol != "paper":
                y = self.real[torch.from_numpy(draw.integers(0, len(self.real), n))]
            elif self.kind == "one-hot":
                y = torch.eye(Y)[torch.from_numpy(draw.integers(0, Y, n))]
            else:
                y = torch.from_numpy(draw.integers(0, 2, (n, Y))).float()
        return Generated(self.net, n, y, seed)

    def real_images(self, split: str, index: np.ndarray) -> Real:
        return Real(self.images[split], index)

    def look(self, source, network: Callable[[Tensor], Tensor], batch: int | None = None) -> Tensor:
        """network(uint8 images) [N, ...] of a source, on the CPU. batch: images at once, by default the world's."""
        what = "generated images" if isinstance(source, Generated) else "real images"
        world = replace(self.world, batch=batch or self.world.batch)
        # Blocks by their first image, so that those of all processes come back in order.
        return world.in_order({block[0]: h.cpu() for block, h in world.scan(source, network, what)})

    def embed(self, source, batch: int | None = None) -> Tensor:
        """Encoder features h float32 [N, F] of a source, on the CPU."""
        return self.look(source, self.features.embed, batch)

    def classify(self, h: Tensor) -> Tensor:
        """Logits [N, Y] of the run's classifier for features h, on the CPU."""
        return self.features.classifier(h.to(self.world.device)).cpu()

    def logged(self, stage: str, key: str) -> float | None:
        """The last value of `key` that the stage's present run wrote to stats.jsonl: not one that was started over."""
        value, images = None, 0
        # A log that is missing or damaged leaves a line out of the report, no more.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            for line in (self.folder / "stats.jsonl").read_text().splitlines():
                entry = json.loads(line)
                if entry.get("stage") == stage:
                    # Fewer images than in the line before: the stage was started over, and older lines do not count.
                    value = entry.get(key, value if entry["images"] > images else None)
                    images = entry["images"]
        return value

    # What metrics.py asks.

    def possible(self, metrics: Sequence[str]) -> list[str]:
        """Those of the metrics that this run has the networks and labels for."""
        if self.features is None:  # the others look through the run's own encoder
            metrics = [m for m in metrics if m in ("fid", "is", "is_published", "kid", "pr", "spectrum")]
        return [m for m in metrics if m not in OF_LABELS or self.kind != "none"]

    def lacks(self) -> str:
        """What a metric that is not `possible` needs."""
        return "a run with its encoder" if self.features is None else "a run with labels"

    def choose(self, need: set[str], by_default: bool, fewest: int, notes: list[str]) -> set[str]:
        """Those of the possible metrics to measure; why others are left out is added to `notes`.

        by_default: whether the user named none. fewest: images a side that t-SNE needs.
        """
        chamfer = {"chamfer", "chamfer_sum"}
        # Twice, since the floor of the distance is that between two sets of real images.
        if len(self.train) < 2 * fewest and need & chamfer:
            few = f"{len(self.train)} training images are too few for its t-SNE, {2 * fewest} are needed"
            notes.append(f"no Chamfer distance: {few}")
            need = need - chamfer
        if self.names and len(self.names) == 1 and self.kind == "one-hot" and "accuracy" in need:
            notes.append("no control accuracy: with one class there is nothing to confuse it with")
            need = need - {"accuracy"}
        if self.clusters and need & OF_LABELS and self.labels("train") is None:
            notes.append(
                "no control accuracy by the judge, no diversity, no I(Y;E) of real images: they need the clusters' "
                f"{self.folder / 'classifier.pt'}"
            )
        if by_default:
            # Only where the user named none: who asks for a slow measure gets it.
            need = need & OF_PAPER if self.protocol == "paper" else need - SLOW
        return need

    def judge(self, steps: int, seed: int) -> JudgeFeatures | None:
        """Features of the independent judge of the run's images; None if these have no labels."""
        if (found := control.load_judge(self, seed, steps)) is None:
            return None
        judge, groups, _ = found
        kind, names, _ = groups[0]
        return JudgeFeatures(judge, kind, len(names))

    def own_features(self, name: str, steps: int, seed: int) -> EncoderFeatures | JudgeFeatures:
        """What --features encoder or judge takes. steps, seed: of the judge's training."""
        features = self.features if name == "encoder" else self.judge(steps, seed)
        if features is None and name == "encoder":
            raise click.ClickException(f"there is no encoder in the run nor {self.folder / 'encoder.pt'}")
        if features is None:
            raise click.ClickException("--features judge: the run's images have no labels that a judge could learn")
        return features

    def sides(self, n: int, seed: int) -> tuple[Generated, Real]:
        """The two sets of images that FID and the like compare: n generated ones, and n real ones or all."""
        # Sorted below, since mapped images are best read in the order of the file.
        order = np.random.default_rng([seed, 5]).permutation(len(self.train))
        return self.generated(n, seed), Real(self.train, np.sort(order[:n]))

    def clouds(self, points: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features [points, F] of real, of generated and of other real images, drawn by the seed, for t-SNE.

        t-SNE magnifies differences in the last digits, so features are computed 64 at once and, on the CPU, on one
        thread: they then depend neither on the batch nor on the processes.
        """
        # One permutation cut in two: no image is in both sets of real ones.
        order = np.random.default_rng([seed, 4]).permutation(len(self.train))[: 2 * points]
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            real, other = (self.embed(Real(self.train, np.sort(part)), 64) for part in np.split(order, [points]))
            return real, self.embed(self.generated(points, seed), 64), other
        finally:
            torch.set_num_threads(threads)

    def ask(self, need: set[str], n: int, seed: int, amounts: dict[str, int], notes: list[str]) -> dict:
        """What control.py measures of this run, as far as `need` names it, on n images; amounts: of metrics.AMOUNTS."""
        results = {}
        if "accuracy" in need:
            results |= control.measure_accuracy(self, n, seed, amounts["judge"])
        if "diversity" in need and (labels := self.labels("train")) is not None:
            results |= control.measure_diversity(self, labels, amounts["each"], seed, notes)
        if "information" in need:
            results |= control.measure_information(self, n, seed)
        return results


class Spectrum:
    """Mean power of the images' brightness at every frequency, as a stream; checkerboards stand out at the highest."""

    def __init__(self, n: int = 0, power: Tensor | float = 0.0):
        self.n, self.power = n, power

    def add(self, images: Tensor) -> None:
        """Take in uint8 [B, S, S, 3]."""
        # float64, since the squares of all images are added up.
        x = images.double().mean(3)
        x = x - x.mean((1, 2), keepdim=True)
        self.join(Spectrum(len(x), torch.fft.fft2(x).abs().square().sum(0).cpu()))

    def join(self, other: "Spectrum") -> None:
        self.n, self.power = self.n + other.n, self.power + other.power

    def watch(self, network: Callable) -> Callable:
        """The network as a function that shows this spectrum all images on their way."""

        def look(images: Tensor) -> object:
            self.add(images)
            return network(images)

        return look

    def nyquist(self) -> tuple[float, float]:
        """Power at the highest frequency across, and down: of stripes with a period of two pixels."""
        power = self.power / self.n
        # Sizes are powers of two, so there is a frequency of exactly half the sampling rate.
        half = len(power) // 2
        return power[:, half].sum().item(), power[half].sum().item()


# ---------------------------------------------------------------------------------------------------------------------
# Tables of results, which are keyed as in the JSON of metrics.py.


def control_table(r: dict, columns: int = 5) -> list[str]:
    """Lines of a run's attribute control in the layout of the paper's Tables 1-3, five attributes a row."""
    # FD where the judge or the encoder took Inception's place.
    names, distance = list(r["accuracy_labels"]), "fd" if "fd" in r else "fid"
    score = "is" if "is" in r else "is_published"
    width = max(9, *map(len, names)) + 2  # 9: as the columns of FD and IS
    lines = [f"{distance.upper():>9s}{'IS':>9s}  Attribute control accuracy"]
    for i in range(0, len(names), columns):
        part = names[i : i + columns]
        lines.append(" " * 20 + "".join(f"{name.replace('_', ' '):<{width}s}" for name in part))
        for by, side, who in (("", "accuracy", "own"), ("", "on", "own, on"), ("", "off", "own, off"),
                              ("judge_", "accuracy", "judge")):  # fmt: skip
            found = [r.get(f"accuracy_{by}labels", {}).get(name, {}).get(side) for name in part]
            if None not in found:
                # FD and IS are of the whole run: once, before the first row of its own classifier.
                first = [f"{r[key]:.2f}" if key in r and i == 0 and who == "own" else "" for key in (distance, score)]
                cells = "".join(f"{f'{value:.2%}':<{width}s}" for value in found)
                lines.append(f"{first[0]:>9s}{first[1]:>9s}  {cells}{who}")
    return lines


def compare(results: Sequence[dict]) -> str:
    """Several runs as one table, a row each: named by its folder, by its file too unless that is gan.pt."""
    paths = [Path(r["network"]).absolute() for r in results]
    folders = [checkpoints.run_folder(p) for p in paths]
    names = [f.name if p.name == "gan.pt" else f"{f.name}/{p.stem}" for f, p in zip(folders, paths, strict=True)]
    # Folders of one name in different places: only their paths tell the runs apart.
    if len(set(names)) < len(names):
        names = [r["network"] for r in results]
    distance = "fd" if any("fd" in r for r in results) else "fid"
    kernel = "kd" if distance == "fd" else "kid"
    columns = (
        (distance, distance.upper(), "{:.2f}"),
        (kernel, kernel.upper(), "{:.4f}"),
        ("is", "IS", "{:.3f}"),
        ("is_published", "IS publ.", "{:.3f}"),
        ("chamfer", "Chamfer", "{:.2f}"),
        ("chamfer_sum", "Ch. sum", "{:.1f}"),
        ("accuracy", "accuracy", "{:.2%}"),
        ("accuracy_judge", "judge", "{:.2%}"),
        ("diversity", "diversity", "{:.3f}"),
    )
    columns = [c for c in columns if any(c[0] in r for r in results)]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{title:>11s}" for _, title, _ in columns)]
    shown = {key for key, *_ in columns}
    for key, what, of in (
        ("features_hash", f"{distance.upper()}, {kernel.upper()} and IS", {distance, kernel, "is"}),
        ("encoder_hash", "Chamfer and diversity", {"chamfer", "diversity"}),
    ):
        # FDs through different encoders or judges are on different scales.
        if shown & of and len({r[key] for r in results if key in r}) > 1:
            lines.insert(0, f"{what}: these runs were seen through different networks, so they do not compare.")
    for key, what, of in (
        ("n", f"{distance.upper()}, {kernel.upper()} and IS", {distance, kernel, "is"}),
        ("protocol", "Accuracy", {"accuracy"}),
    ):
        if shown & of and len({r[key] for r in results if key in r}) > 1:
            other = "numbers of images" if key == "n" else "protocols, which have different rules"
            lines.insert(0, f"{what}: these runs have different {other}, so they do not compare.")
    for name, r in zip(names, results, strict=True):
        # Runs may have been asked for different measures.
        cells = (form.format(r[key]) if key in r else "-" for key, _, form in columns)
        lines.append(f"{name:{width}s}" + "".join(f"{cell:>11s}" for cell in cells))
    return "\n".join(lines)
