"""Data: labelled images in [0, 1], the pixel space of a model, bundled photos and loaders."""

from leakatlas.data.box import CIFAR10 as CIFAR10
from leakatlas.data.box import IMAGENET as IMAGENET
from leakatlas.data.box import Box as Box
from leakatlas.data.bundled import digits as digits
from leakatlas.data.bundled import faces as faces
from leakatlas.data.bundled import patches as patches
from leakatlas.data.bundled import photos as photos
from leakatlas.data.bundled import strangers as strangers
from leakatlas.data.folders import image_folder as image_folder
from leakatlas.data.images import ImageSet as ImageSet
from leakatlas.data.intake import Batch as Batch
from leakatlas.data.intake import as_images as as_images
from leakatlas.data.loaders import load as load
from leakatlas.data.loaders import parquet as parquet
from leakatlas.data.loaders import torchvision_set as torchvision_set
