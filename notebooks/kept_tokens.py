"""Draws the README's picture: `python kept_tokens.py images/kept_tokens.png [QUESTION]`."""

import sys

import vlmprune
from PIL import Image, ImageDraw, ImageFont
from vlmprune.eval import embedded

SIDE, GAP, CAPTION = 336, 12, 62
METHODS = ("random", "divprune", "vtc_cls", "hiprune", "fastv")
KEEP = 0.2


def main(path: str, number: int) -> None:
    model, processor = embedded.load_model()
    question = embedded.questions()[number]
    prompt = embedded.prompt(processor, question.question)
    inputs = processor(images=question.image, text=prompt, return_tensors="pt")

    def ask() -> str:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    size = (SIDE, SIDE)
    panels = [("all 196 tokens", ask(), question.image.resize(size, Image.Resampling.BICUBIC))]
    for name in METHODS:
        with vlmprune.patch(model, name, keep_ratio=KEEP) as handle:
            answer = ask()
            picture = handle.overlay(question.image).resize(size, Image.Resampling.LANCZOS)
            panels.append((f"{name}: {handle.last.tokens_kept[0]} tokens", answer, picture))

    width, height = 3 * (SIDE + GAP) + GAP, 2 * (SIDE + CAPTION + GAP) + GAP + 40
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(22), ImageFont.load_default(19)
    title = f"“{question.question.removesuffix('?').strip()}?”   ({question.answer})"
    draw.text((GAP, GAP), title, "black", large)
    for index, (caption, answer, picture) in enumerate(panels):
        x = GAP + index % 3 * (SIDE + GAP)
        y = GAP + 40 + index // 3 * (SIDE + CAPTION + GAP)
        sheet.paste(picture, (x, y))
        draw.text((x, y + SIDE + 4), caption, "black", small)
        right = "#2a7a2a" if embedded.is_correct(answer, question.answer) else "#b02020"
        draw.text((x, y + SIDE + 28), answer, right, small)
    sheet.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 18)
