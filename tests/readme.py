"Make README.md from nbs/index.ipynb: python tests/readme.py. The index's tables come from finished runs by the functions below."

import json, re
from pathlib import Path

from IPython.display import Markdown, display
from nbconvert import MarkdownExporter
from PIL import Image
from traitlets.config import Config

ROOT = Path(__file__).parent.parent


def readme() -> str:
    "README's text: the index notebook in Markdown, with links that hold from the top folder and without the code behind its tables."
    config = Config(
        TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"output"}),
        MarkdownExporter=dict(preprocessors=["nbconvert.preprocessors.TagRemovePreprocessor"]),
    )
    text = MarkdownExporter(config=config).from_filename(str(ROOT / "nbs" / "index.ipynb"))[0]
    text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def results(name):
    return json.loads((ROOT / "runs" / name / "results.json").read_text())


def copy_figure(name, figure):
    "Show a run's figure in the index, from a small copy beside the notebooks."
    target = ROOT / "nbs" / "images" / f"{name}-{figure}.png"
    target.parent.mkdir(exist_ok=True)
    picture = Image.open(ROOT / "runs" / name / f"{figure}.png").convert("RGB")
    picture.resize((1400, round(1400 * picture.height / picture.width)), Image.LANCZOS).quantize(
        128
    ).save(target, optimize=True)
    display(Markdown(f"![{figure} of the run {name}](images/{target.name})"))


def results_table(*names):
    "Table 1's measure and what should stand beside it, a row a model."

    def show(part):
        return f"{part['value']:.3f} [{part['low']:.3f}, {part['high']:.3f}]"

    rows = [
        [
            "run",
            "model",
            "pairs: train / eval",
            "KL(chosen ‖ rejected), KDE",
            "KL, swapped",
            "pairwise accuracy",
            "NLL",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    for r in map(results, names):
        for model, label in (("scalar", "scalar"), ("quantile", "QR")):
            b = r["models"][model]
            rows.append(
                [
                    r["name"],
                    label,
                    f"{r['n_train']:,} / {r['n_eval']:,}",
                    show(b["kl"]["kde"]),
                    f"{b['kl']['kde']['swapped']:.3f}",
                    show(b["intervals"]["accuracy"]),
                    show(b["intervals"]["nll"]),
                ]
            )
        d = r["difference"]
        rows.append(
            [
                r["name"],
                "**QR − scalar**",
                "",
                f"**{show(d['kl']['kde'])}**",
                "",
                f"**{show(d['accuracy'])}**",
                f"**{show(d['nll'])}**",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def truth_table(*names):
    "What only the embedded world can tell."
    rows = [
        [
            "run",
            "model",
            "correlation with the true difference of means, within pairs",
            "rank correlation of spread with the true spread",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    for r in map(results, names):
        rows += [
            [
                r["name"],
                dict(scalar="scalar", quantile="QR")[t["model"]],
                f"{t['difference_correlation']:.2f}",
                f"{t['spread_correlation']:.2f}" if "spread_correlation" in t else "",
            ]
            for t in sorted(r["truth"], key=lambda t: t["model"], reverse=True)
        ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def throughput_table(name):
    "Pairs per second of three ways to train."
    r = results(name)
    rows = [["training pairs per second (median of rounds)", "float32", "bfloat16"], ["---"] * 3]
    rows += [
        [label, *(f"{r[k][d]:.2f}" for d in ("float32", "bfloat16"))]
        for k, label in (
            ("trl", f"TRL {r['trl_version']} RewardTrainer"),
            ("padded", "ours, plain batch"),
            ("shared", "ours, shared prompt"),
        )
    ]
    rows.append(
        [
            "**shared prompt over TRL**",
            *(f"**{r['ratio'][d]:.1f}×**" for d in ("float32", "bfloat16")),
        ]
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def calibration_table(runs):
    "What each objective learns of spread where the truth is known, a row an objective; `runs`: a run's name → its number of pairs."
    rows = [
        [
            "world",
            "objective",
            "rank correlation with the true spread, each seed",
            "predicted over true range",
            "log-loss above the best possible, 10⁻⁴ nats",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    mean = lambda values: sum(values) / len(values)
    for world, objectives, pairs in [
        (*of, pairs) for name, pairs in runs.items() for of in results(name)["worlds"].items()
    ]:
        for k in [
            k
            for k in ("scalar × 4", "label QR", "free", "PURM", "distributional")
            if k in objectives
        ]:
            m, bold = objectives[k][str(pairs)], "**" if k == "distributional" else ""
            rows.append(
                [
                    world,
                    f"{bold}{k}{bold}",
                    "  ".join(f"{v:.2f}" for v in m["spread_correlation"]),
                    f"{mean(m['scale_ratio']):.2f}",
                    f"{1e4 * mean(m['nll_gap']):.0f}"
                    + (
                        f" (temperature fitted: {1e4 * mean(m['nll_gap_fitted']):.0f})"
                        if "nll_gap_fitted" in m
                        else ""
                    ),
                ]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
