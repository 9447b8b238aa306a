"""Models: the architectures of the literature at sizes a CPU can attack, and shipped weights."""

from leakatlas.models.allconv import AllConv as AllConv
from leakatlas.models.checkpoints import Card as Card
from leakatlas.models.checkpoints import apply_state as apply_state
from leakatlas.models.checkpoints import card as card
from leakatlas.models.checkpoints import load_for as load_for
from leakatlas.models.checkpoints import load_state as load_state
from leakatlas.models.checkpoints import load_weights as load_weights
from leakatlas.models.checkpoints import pretrained as pretrained
from leakatlas.models.checkpoints import shipped as shipped
from leakatlas.models.cnn6 import CNN6 as CNN6
from leakatlas.models.convnet import ConvNet as ConvNet
from leakatlas.models.denoiser import Denoiser as Denoiser
from leakatlas.models.fc import FCNet as FCNet
from leakatlas.models.fitting import fit_state as fit_state
from leakatlas.models.generators import Generator as Generator
from leakatlas.models.lenet import LeNet as LeNet
from leakatlas.models.lenet5 import LeNet5 as LeNet5
from leakatlas.models.registry import build as build
from leakatlas.models.registry import names as names
from leakatlas.models.resnet import ResNet as ResNet
from leakatlas.models.strided import StridedNet as StridedNet
from leakatlas.models.vgg import VGG as VGG
from leakatlas.models.vit import ViT as ViT
