"""What a model says of several images, whatever its task: as a list, and as JSON has it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar


class OfImage(Protocol):
    """What a model says of one image."""

    @property
    def file(self) -> str:
        """The image, as it was named or found."""

    def lines(self) -> list[str]:
        """For people."""

    def comparison(self) -> str:
        """For people: how the float model's agrees with it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""


P = TypeVar("P", bound=OfImage)


@dataclass(eq=False, repr=False, kw_only=True)
class PredictionList(list[P]):
    """Predictions for the images that could be read, in the order of the images.

    Attributes:
        kind: what the list, as a file, says that it is.
        model: what predicted.
        image_size: side in pixels of what it saw.
        compared: the float model that was compared with; None for none.
        unreadable: images that could not be read, and what is wrong with each.
        pictures: of images that were drawn, the name of the picture in the output folder.
    """

    kind: ClassVar[str]
    model: str
    image_size: int
    compared: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What was set besides, as JSON has it."""

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """How this model and the float one agree in all images, as JSON has it."""

    @abstractmethod
    def summary(self) -> str:
        """For people: what is in all images, without their number."""

    @abstractmethod
    def comparison(self) -> str:
        """For people: how this model and the float one agree in all images."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        images = [prediction.to_dict() for prediction in self]
        for image in images:
            if image["file"] in self.pictures:
                image["picture"] = self.pictures[image["file"]]
        document: dict[str, Any] = {
            "kind": self.kind,
            "version": 1,
            "model": self.model,
            "image_size": self.image_size,
            **self.settings(),
            "images": images,
            "unreadable": [{"file": file, "problem": why} for file, why in self.unreadable.items()],
        }
        if self.compared is not None:
            document["compare"] = {"model": self.compared, **self.counts()}
        return document
