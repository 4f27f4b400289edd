"""How recipes name pictures: by a path, or a table of one and more."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from training.recipe import Recipe


class PicturesConfig(Recipe):
    """A set of pictures, or its path alone; `training.pictures.sets` says what is read and how."""

    path: str = Field(
        min_length=1, description="a folder, a .tar, a folder of .tar files or hfds/ORG/NAME"
    )
    split: str | None = Field(None, description="of a hub data set, which must name it: train")
    columns: tuple[str, str] = Field(
        ("image", "label"), description="of a hub data set: where pictures and classes are"
    )
    list: str | None = Field(
        None, description="a file of lines `relative/path class`, in the folder or beside the .tar"
    )
    labels: Literal["one", "many"] = Field(
        "one",
        exclude_if=lambda labels: labels == "one",
        description="of a list: many, if a line is `relative/path class,class,...`, or - for none",
    )
    times: int = Field(1, ge=1, description="how often each picture counts in an epoch")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise ValueError(f"this is one set of pictures, got {len(value)}")
            value = value[0]
        if isinstance(value, str | dict | cls):
            return {"path": value} if isinstance(value, str) else value
        raise ValueError("pictures are a path or a table of path, split, ...")

    @model_validator(mode="after")
    def _many_in_a_list(self) -> "PicturesConfig":
        if self.labels == "many" and self.list is None:
            raise ValueError(f"labels=many is for a list of pictures; {self.path} is given none")
        return self

    @model_validator(mode="after")
    def _split_or_list(self) -> "PicturesConfig":
        if self.path.startswith("hfds/"):
            if self.split is None or self.list is not None:
                raise ValueError(
                    f"{self.path} is a hub data set: it needs a split and takes no list"
                )
        elif self.split is not None:
            raise ValueError(
                f"{self.path} is no hub data set (hfds/ORG/NAME): it has no split {self.split!r}; "
                "give the folder or the list of that part"
            )
        return self


def _sets(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


#: One set or several: a path, a table, or a list of either.
PictureSets: TypeAlias = Annotated[
    tuple[PicturesConfig, ...], BeforeValidator(_sets), Field(min_length=1)
]
