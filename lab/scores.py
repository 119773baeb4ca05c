"""Scores of images for their prompts: PickScore, CLIP score and LAION's aesthetic score.

    python lab/scores.py images/        a folder of images and prompts.txt, one line for each image

03_pixart_t2i.py --sample RUN --out images/ writes such a folder. A score without its model is left
out; lab/PIXART.md says where models are from. images/scores.json gets the scores of each image, the
means, and the SHA-256 of the models. The paper's PickScore is presumably this one divided by 100.
"""
import importlib
import sys
from collections import OrderedDict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import (load_frozen, one_line_errors, pick_device, plain_parser, progress, reading,
                    require, save, sha256)

t2i = importlib.import_module("03_pixart_t2i")


def load_clip(folder):
    """CLIPModel and its processor, from a folder. UserError if a file or a tensor is missing."""
    with reading(folder, "a CLIP: config.json, model.safetensors, the tokenizer's files and the "
                 "preprocessor's"):
        for name in ("preprocessor_config.json", "tokenizer_config.json"):
            t2i.read_config(folder, name)
        processor = transformers.AutoProcessor.from_pretrained(folder, **t2i.LOCAL)
        model = t2i.load_network(transformers.CLIPModel, folder)
        side, images = model.config.vision_config.image_size, processor.image_processor
        require(images.size == {"shortest_edge": side} and
                images.crop_size == {"height": side, "width": side}, "images of another size")
        with torch.no_grad():  # a wrong type in a file of the preprocessor's is an error now
            embed_batch(model, processor, [Image.new("RGB", (9, 9))], ["a"])
    return model.eval().requires_grad_(False), processor


def embed_batch(model, processor, images, texts):
    """Pillow images and texts -> CLIP's embeddings of each, two tensors."""
    # One image at a time is prepared, since the images may be large.
    pixels = [processor(images=image, return_tensors="pt").pixel_values for image in images]
    words = processor(text=texts, padding=True, truncation=True, max_length=77,
                      return_tensors="pt").to(model.device)
    return (model.get_image_features(torch.cat(pixels).to(model.device)).pooler_output,
            model.get_text_features(words.input_ids, words.attention_mask).pooler_output)


def open_images(files):
    """Yields images in RGB, one by one, so that only one is in memory."""
    for file in files:
        with (reading(file, "a PNG or JPEG of at most 16,777,216 pixels"),
              Image.open(file, formats=("PNG", "JPEG")) as image):
            require(image.width * image.height <= 2**24, f"it is {image.width}x{image.height}")
            image = image.convert("RGB")
        yield image


@torch.no_grad()
def embed(folder, files, prompts, device, batch=32):
    """Image files and as many prompts -> CLIP's embeddings of both (N, D), of length 1, and the
    scale of its logits, which is 100 in most models."""
    model, processor = load_clip(folder)
    model, images, texts = model.to(device), [], []
    for first in progress(range(0, len(files), batch), Path(folder).name):
        some = slice(first, first + batch)
        image, text = embed_batch(model, processor, open_images(files[some]), prompts[some])
        images.append(image)
        texts.append(text)
    images, texts = [F.normalize(torch.cat(v)) for v in (images, texts)]
    return images, texts, model.logit_scale.exp().item()


def load_aesthetic(path):
    """LAION's sac+logos+ava1-l14-linearMSE.pth -> its network of CLIP's embeddings of images, of
    length 1, (N, 768) -> (N, 1). UserError for another file."""
    def head():  # the numbers that are left out are dropouts, which do nothing here
        sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        layers = OrderedDict((str(k), nn.Linear(*size)) for k, size in sizes.items())
        return nn.ModuleDict({"layers": nn.Sequential(layers)})
    with reading(path, "LAION's aesthetic head for CLIP ViT-L/14"):
        return load_frozen(head, {}, t2i.read_weights(path))["layers"]


def measure(args, files, prompts, device):
    """-> {score: values (N,)}. CLIP score is that of Hessel et al. 2021, times 100 as is usual;
    PickScore is that of Kirstain et al. 2023."""
    scores = {}
    for path in (args.clip, args.pickscore, args.aesthetic):
        if not Path(path).exists():
            print(f"not measured, since it is not there: the score of {path}")
    if Path(args.clip).exists():
        head = load_aesthetic(args.aesthetic) if Path(args.aesthetic).exists() else None
        images, texts, _ = embed(args.clip, files, prompts, device)
        scores["clipscore"] = (100 * (images * texts).sum(1)).clamp(min=0)
        if head:
            scores["aesthetic"] = head.to(device)(images)[:, 0]
    if Path(args.pickscore).exists():
        images, texts, scale = embed(args.pickscore, files, prompts, device)
        scores["pickscore"] = scale * (images * texts).sum(1)
    require(scores, "no model is there: name the folder of a CLIP by --clip or --pickscore")
    return scores


def weights_of(args, scores):
    """-> the paths of the weights that these scores come from."""
    folders = {"clipscore": args.clip, "pickscore": args.pickscore}
    paths = [Path(args.aesthetic)] if "aesthetic" in scores else []
    for folder in [Path(folder) for name, folder in folders.items() if name in scores]:
        paths += list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sorted(set(paths))


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="images (.png, .jpg), scored in the order of their names")
    add("--prompt-file", metavar="FILE", help="in place of the folder's prompts.txt")
    add("--clip", metavar="DIR", default="checkpoints/clip-vit-large-patch14", help="ViT-L/14")
    add("--pickscore", metavar="DIR", default="checkpoints/PickScore_v1", help="a CLIP too")
    add("--aesthetic", metavar="FILE", default="checkpoints/sac+logos+ava1-l14-linearMSE.pth",
        help="LAION's head for --clip")
    add("--device", default="auto", help="auto (the best one here), cpu, cuda or mps")
    args = parser.parse_args(argv)
    device, folder = pick_device(args.device), args.folder
    require(folder.is_dir(), f"{folder}: expected a folder of images and their prompts.txt")
    files = sorted(path for path in folder.iterdir()
                   if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    prompts = t2i.read_prompts(args.prompt_file or folder / "prompts.txt")
    require(len(files) == len(prompts), f"{folder}: {len(files)} images (.png, .jpg) and "
            f"{len(prompts)} prompts, expected as many")
    scores = measure(args, files, prompts, device)
    for name, values in scores.items():
        print(f"{name} {values.mean():.4f}, standard deviation {values.std(correction=0):.4f}")
    columns = {"file": [file.name for file in files], "prompt": prompts}
    columns |= {name: values.tolist() for name, values in scores.items()}
    save({"images": len(files), "means": {name: v.mean().item() for name, v in scores.items()},
          "models": {str(path): sha256(path) for path in weights_of(args, scores)},
          "each": [dict(zip(columns, row)) for row in zip(*columns.values())]},
         folder / "scores.json")
    print(f"the scores of each image, and the models' SHA-256: {folder}/scores.json")


if __name__ == "__main__":
    main()
