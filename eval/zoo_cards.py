"""Measures the zoo's teachers and writes their cards: `python eval/zoo_cards.py NAME [--guidance G] [--protocol NAME]`.

Into fewstep/zoo/models/NAME go card.json (the guidance the teacher is meant for), results.json (its rows at 50, 8, 4, 2 and 1
steps under the protocol, with floor, one-shape accuracy, environment) and README.md, rendered from them.
"""

from __future__ import annotations

import argparse
import json

import torch

from fewstep.adapters import load_teacher
from fewstep.evaluation import results
from fewstep.evaluation.protocol import Protocol, load_prompts, load_protocol
from fewstep.evaluation.reference import reference_images
from fewstep.judging import evaluate, table
from fewstep.zoo import folder, home
from fewstep.zoo import guidance as meant_for
from fewstep.zoo.reading import accuracy

STEPS = [50, 8, 4, 2, 1]
ABOUT = {
    "sprites-sd": "Small Stable Diffusion: AutoencoderKL (8x), CLIP text encoder, epsilon-predicting UNet on 8x8x8 latents.",
    "sprites-flow": "A flow-matching transformer (ZImagePipeline) with a Qwen3 text encoder, on 16x16x4 latents.",
    "clouds-sd": "Small Stable Diffusion: AutoencoderKL (4x), CLIP text encoder, v-predicting UNet on 16x16x4 latents, cosine.",
    "clouds-flow": "A flow-matching transformer (SanaPipeline) with a Gemma2 text encoder, which learnt clouds-sd's velocity.",
}


def reading_scores(name: str, protocol: Protocol) -> dict[str, float]:
    """Attribute accuracy of true drawings and of the autoencoder's reconstructions of them: the ceilings of every model."""
    images, texts = reference_images(protocol.reference, protocol.n, protocol.seed), load_prompts(protocol)
    teacher = load_teacher(f"zoo:{name}")
    again = teacher.to_images(teacher.to_latents(images))
    return {"drawings": float(accuracy(texts, images).mean()), "reconstructions": float(accuracy(texts, again).mean())}


def card(name: str, guidance: float, found: dict, ceilings: dict[str, float]) -> str:
    """The card's text."""
    protocol = found["protocol"]
    lines = [
        *("---", "license: apache-2.0", "library_name: diffusers", "---", ""),
        f"# zoo:{name}",
        "",
        ABOUT[name],
        "",
        f"Made by `python -m fewstep.zoo.build`; measured by `python eval/zoo_cards.py {name} --guidance {guidance:g}`",
        f"(protocol `{protocol['name']}`, {protocol['n']} samples, seed {protocol['seed']}, {found['environment']['cpu']},",
        f"commit {found['environment']['git_commit']}). Guidance scale {guidance:g} (u + g (c - u)). Licence: Apache-2.0.",
        "",
        "| steps | FD | KID | coverage | CLIP | accuracy | one shape |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found["rows"], key=lambda r: -r["steps"]):
        numbers = [f"{row[k]:.4g}" for k in ("fd", "kid", "coverage", "clip", "accuracy", "accuracy_one")]
        lines.append(f"| {row['steps']} | " + " | ".join(numbers) + " |")
    fd = {r["steps"]: r["fd"] for r in found["rows"]}
    lines += [
        "",
        f"Floor (true drawings against true drawings): FD {protocol['fd_floor']:.4g}. "
        f"FD at 4 steps is {fd[4] / fd[50]:.2f} times, at 1 step {fd[1] / fd[50]:.1f} times that at 50.",
        f"Accuracy of true drawings {ceilings['drawings']:.4f}, of reconstructions {ceilings['reconstructions']:.4f}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(ABOUT))
    parser.add_argument("--guidance", type=float, help="if not given, what its card says")
    parser.add_argument("--protocol", help="if not given, that of the teacher's world")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = folder(args.name)
    scale = args.guidance if args.guidance is not None else meant_for(args.name)
    if scale is None:
        parser.error(f"zoo:{args.name} has no card yet; say at which --guidance it is meant to be drawn")
    (place / "card.json").write_text(json.dumps({"guidance": scale}) + "\n")
    protocol = args.protocol or home(args.name)
    found, _ = evaluate(f"zoo:{args.name}", protocol, out=place / "results.json", steps=STEPS, fresh=True, teacher=True)
    ceilings = reading_scores(args.name, load_protocol(protocol))
    (place / "README.md").write_text(card(args.name, scale, found, ceilings))
    results.read(place / "results.json")
    print(table(found))


if __name__ == "__main__":
    main()
