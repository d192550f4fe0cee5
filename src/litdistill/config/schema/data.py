"""The options of data: those of `ImageData`, and of the functions that return a `TensorData`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from litdistill.config.schema.fields import (
    Count,
    CountFromZero,
    Deviations,
    Node,
    NotNegative,
    Numbers,
    Object,
    Part,
    Pixels,
    Positive,
    Said,
    Seed,
    Share,
    Text,
    option,
)

HeldOut = Part | Annotated[int, Field(ge=2)]
Class = Annotated[CountFromZero | Text, Said("a class, by number or name")]
Speaker = Annotated[CountFromZero | Text, Said("a speaker, by number or name")]
Classes = Annotated[list[Class], Field(min_length=2)]

Augmentations = Annotated[list[Text | dict[str, Any]], Said("a list of augmentations, [Flip,{Crop:{pad:4}}]")]


class ImageData(Node):
    """`data` of images: conf/data/base.yaml."""

    module: str = Field(alias="_target_", description="the data module: any LightningDataModule")
    name: Text = option("which data set: digits, mnist, fashion_mnist, cifar10, cifar100, folder or shards")
    root: Text | None = option("the folder of its files")
    image_size: Count | None = option("side to which the images of a folder are resized and cropped")
    classes: Classes | None = option("[0, 1] or [cat, dog] makes a two-class problem of any data set")
    val_size: HeldOut = option("held out of the training set: a fraction below 1, or a number of images", usual=0.1)
    fraction: Share | None = option("train on this share of the rest ...")
    per_class: Count | None = option("... or on so many images of each class")
    omit: list[Class] | None = option(
        "classes whose images are not trained on: [3], or [cat]; the network keeps its outputs for them"
    )
    subset_seed: Seed | None = option("which images these are")
    epoch_size: Count | None = option("samples of an epoch, where it is not the whole training set once")
    unlabelled: Text | None = option("a folder of images without labels, which only the teacher says what they are")
    labelled: bool | None = option("false: train on those alone; images with labels still validate and test")
    labels: Text | None = option(
        "a CSV, TSV or Parquet file of a folder's files and their labels: one class, several, or numbers"
    )
    target: Text | list[Text] | None = option("its columns of labels; null: all but those of names and splits")
    task: Literal["classification", "multilabel", "regression"] | None = option(
        "what these are, where numbers look like classes; null: found from them"
    )
    balanced: bool | None = option("true: each class is drawn equally often, however few its images are")
    batch_size: Count = option("images of a step of training, in each process")
    eval_batch_size: Count = option("images of a step without gradients")
    augment: Augmentations | None = option("what is done to the images of each training batch, in this order")
    mix: Object | None = option(
        "with whom each image and its label are mixed after that",
        usual="{_target_: litdistill.data.mixing.Mixup, alpha: 0.2}",
    )
    fixed_views: Count | None = option(
        "see each image in so many of its views only, over and over, so that a teacher's outputs can be kept"
    )
    mean: Pixels | None = option("of each channel, on the scale 0 to 1; null: measured on the training set")
    std: Deviations | None = option("likewise; both are given, or neither")
    seed: Seed = option("of order and augmentation")
    view_seed: Seed | None = option(
        "of augmentation alone; a number where the teacher is to be asked once for runs of several seeds"
    )
    download: bool = option("fetch files that are missing")
    resident: bool | Literal["auto"] = option(
        "true: decoded once, and kept in memory; false: decoded by workers ahead of each use; auto: as they fit"
    )
    memory_gb: NotNegative = option("what auto lets them take, 10^9 bytes: images · channels · image_size²")
    decode: Literal["exact", "scaled"] | None = option(
        "scaled: large JPEGs to train on are decoded at 1/2 to 1/8 of their size, faster; null: exact"
    )
    workers: CountFromZero = option("processes that decode, where they are not resident; leave a core for training")


class TensorData(Node):
    """`data` in memory that are no images: the options of every function that returns a `TensorData`."""

    module: str = Field(alias="_target_", description="the data module: any LightningDataModule")
    val_size: HeldOut = option("held out of the training set: a fraction below 1, or a number of samples", usual=0.1)
    fraction: Share | None = option("train on this share of the rest")
    labels: Count | None = option("so many of these keep their label, where labels are classes; null: all")
    only_labelled: bool = option(
        "true: leave out those without a label, which else only the teacher says what they are"
    )
    subset_seed: Seed | None = option("which samples these are")
    epoch_size: Count | None = option("samples of an epoch, where it is not the whole training set once")
    augment: Augmentations | None = option("what is done to the samples of each training batch, in this order")
    fixed_views: Count | None = option(
        "see each sample in so many of its views only, over and over, so that a teacher's outputs can be kept"
    )
    batch_size: Count = option("samples of a step of training, in each process")
    eval_batch_size: Count = option("samples of a step without gradients")
    seed: Seed = option("of order and augmentation")
    view_seed: Seed | None = option(
        "of augmentation alone; a number where the teacher is to be asked once for runs of several seeds"
    )


class Tokenized(TensorData):
    """`data` of texts: conf/data/movie_reviews.yaml and texts.yaml."""

    root: Text | None = option(
        "texts: a folder of class folders of .txt files, or a .tsv, .csv or .jsonl file; movie_reviews: where its file is"
    )
    test: Text | None = option("a file of texts to test on; null: a fifth of each class, or the folder test/")
    validation: Text | None = option("a file of texts to validate on; null: data.val_size, or the folder val/")
    unlabelled: Text | None = option(
        "texts to train on without labels: a .txt file with one a line, a table, or a folder of .txt files"
    )
    text: Text = option("the column, or key of .jsonl, of the text")
    label: Text = option("the column, or key, of the class; a text where it is empty has no label")
    classes: Classes | None = option("the labels in their order; null: those of the training texts, sorted")
    encoding: Text = option("of the files: utf-8, cp1252, shift_jis, …")
    tokenizer: Text = option("minilm; bpe, trained on the training texts; or the path of a tokenizer.json")
    vocab_size: Count = option("tokens at most of a tokenizer that is trained")
    length: Count = option("tokens of a text, behind which it is cut")
    download: bool = option("fetch a file that is missing")


class Sequences(TensorData):
    """`data` of token sequences: conf/data/docstrings.yaml and token_sequences.yaml."""

    root: Text | None = option(
        "token_sequences: a .txt file, or a folder of them; docstrings: where what was read is kept"
    )
    test: Text | None = option("a .txt file or folder to test on; null: the last tenth of the text")
    encoding: Text = option("of the files: utf-8, cp1252, shift_jis, …")
    vocab_size: Annotated[int, Field(ge=258)] = option("tokens at most of the byte-level tokenizer of these texts")
    length: Annotated[int, Field(ge=2)] = option("tokens of a sequence")
    held_out: Count = option("sequences to validate on at most, and to test on")


class Standardized(TensorData):
    """`data` of features: conf/data/diabetes.yaml."""

    mean: Numbers | None = option(
        "of each feature, by which networks standardize; null: measured on what is not held out"
    )
    std: Deviations | None = option("likewise; both are given, or neither")


class Sounds(TensorData):
    """`data` of sounds: conf/data/sounds.yaml."""

    root: Text | None = option("the folder of the sounds")
    length: Positive = option(
        "seconds of each sound; a longer one is cut to its middle, a shorter one padded with silence"
    )
    sample_rate: Count | None = option(
        "samples a second, to which others are resampled; null: as most of the training files have"
    )


class SpokenDigits(TensorData):
    """`data` of spoken digits: conf/data/spoken_digits.yaml."""

    root: Text | None = option("the folder of its files, or a copy of the repository or its archive")
    length: Positive = option(
        "seconds of each sound; a longer one is cut to its middle, a shorter one padded with silence"
    )
    held_out: Annotated[list[Speaker], Field(min_length=1)] | None = option(
        "[theo] or [4]: speakers who are the test set, with all of their recordings; null: recordings 0 to 4 of all"
    )
    validation: Speaker | None = option(
        "the speaker who is the validation set; null: the first of the others, or val_size where no speaker is held out"
    )
    download: bool = option("fetch files that are missing")


class Scenes(TensorData):
    """`data=digit_scenes`: conf/data/digit_scenes.yaml."""

    count: Annotated[int, Field(ge=2)] = option("scenes to train on, those to validate on included")
    size: Annotated[int, Field(ge=32, le=160)] = option("pixels of a side")


class Masks(TensorData):
    """`data=masks`: conf/data/masks.yaml."""

    root: Text | None = option("a folder of images/ and masks/, whose files have the same names but for the suffix")
    size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = option(
        "side, or height and width, into which pictures and masks are fitted; null: as they are, all of one size"
    )
    classes: Classes | None = option("their names from 0 on; null: class 0, … up to the largest in a mask")
    unlabelled: bool = option("true: pictures to train on may lack a mask, and the teacher alone says what is there")


Sides = Annotated[
    list[Annotated[int, Field(ge=16, le=4096)]],
    Field(min_length=2, max_length=2),
    Said("[height, width] in pixels, [96, 128]"),
]


class BloodCells(TensorData):
    """`data=bccd`: conf/data/bccd.yaml."""

    root: Text | None = option("the folder of its files, or a copy of the repository or its archive")
    size: Sides = option("[height, width] in pixels that each picture is fitted into, whole, its aspect kept")
    download: bool = option("fetch files that are missing")


class Voc(TensorData):
    """`data=voc`: conf/data/voc.yaml."""

    root: Text | None = option("the folder of the pictures and their boxes")
    train: Text | None = option("what is trained on: a JSON file, or VOC's list; null: found by its name")
    validation: Text | None = option("what is validated on, likewise; null: found by its name, else data.val_size")
    test: Text | None = option("what is tested on, likewise; null: found by its name, else a fifth of train")
    unlabelled: Text | None = option(
        "a folder of further pictures to train on, which only the teacher says what they show"
    )
    classes: list[Text] | None = option("names in the order of the outputs, [cat, dog]; null: all that are annotated")
    size: Sides = option("[height, width] in pixels that each picture is fitted into, whole, its aspect kept")


class Coco(Voc):
    """`data=coco`: conf/data/coco.yaml."""

    images: Text | None = option("the folder of the pictures; null: found")


class Table(Standardized):
    """`data=table`: conf/data/table.yaml."""

    root: Text | None = option("a CSV, TSV or Parquet file with the names of its columns")
    target: Text | list[Text] | None = option("its column of classes or numbers; or several, of 0 and 1 or of numbers")
    test: Text | None = option("a file of test rows; null: a fifth, drawn at random")
    split: Text | None = option("a column that says train, val or test, instead")
    ignore: list[Text] | None = option("columns that are left out, such as names and ids: [id]")
    categorical: list[Text] | None = option("columns of numbers that are categories: [postal_code]")
    missing: Literal["mean", "drop"] | None = option(
        "mean: missing values get the training rows' mean or most frequent category; drop: such rows go; null: refused"
    )
    encode: Literal["onehot", "ordinal"] = option("of a category: a feature for each, or its code (net=embedding_mlp)")
    classes: list[Class] | None = option("the labels in the order of the outputs; null: those that occur")
    task: Literal["classification", "multilabel", "regression"] | None = option(
        "what the targets are, where numbers look like classes; null: found from them"
    )
