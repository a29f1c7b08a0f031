"""Model 3, 73,994 parameters: depthwise separable blocks with dilation 1, 2, 4 at the end.

    python model_3.py                # print the summary table
    python train.py --model 3        # train it

Measured, test set, seed 0, one core of an AMD EPYC beside another training:
86.37 % after 12 epochs (15 min); 87.92 % after 20 epochs (42 min);
90.60 % after 75 epochs (104 min);
91.95 % after 75 epochs, distilled from CNN_Model_1, itself distilled from a ResNet (94 min);
91.12 % after 75 epochs, distilled from CNN_Model_1 (83 min; no teacher's time is counted);
88.73 % after 20 epochs, distilled from CNN_Model_1 and CNN_Model_1 (25 min).
On two cores of an Intel Xeon, hardened against JPEG and noise (`--set robust=0.4 --set
augment=0.2`): 90.14 % after 75 epochs (68 min).

No max pooling: stride 2 halves the size. Every convolution is without bias and followed by
BatchNorm and ReLU. A block is a depthwise 3x3 (one filter a channel) and a pointwise 1x1 (which
mixes the channels), and a 1x1 reduction brings the 96 channels back to 64 before the next.
"Receptive field" is the side of the square of input pixels that one output value sees: it grows
by (kernel - 1) * dilation * jump, where the jump, the distance in input pixels between two
neighbouring values, doubles at every stride 2 (Araujo et al., 2019,
https://distill.pub/2019/computing-receptive-fields).

    layer    kind                            output      parameters  receptive field
    ---------------------------------------------------------------------------------
    conv1    3x3                             32x32x32           864                3
    conv2    3x3                             32x32x32         9,216                5
    depth1   3x3, depthwise, stride 2        32x16x16           288                7
    point1   1x1                             64x16x16         2,048                7
    depth2   3x3, depthwise                  64x16x16           576               11
    point2   1x1                             96x16x16         6,144               11
    reduce2  1x1                             64x16x16         6,144               11
    depth3   3x3, depthwise                  64x16x16           576               15
    point3   1x1                             96x16x16         6,144               15
    reduce3  1x1                             64x16x16         6,144               15
    depth4   3x3, depthwise, stride 2        64x8x8             576               19
    point4   1x1                             96x8x8           6,144               19
    reduce4  1x1                             64x8x8           6,144               19
    depth5   3x3, depthwise, dilation 2      64x8x8             576               35
    point5   1x1                             96x8x8           6,144               35
    reduce5  1x1                             64x8x8           6,144               35
    depth6   3x3, depthwise, dilation 4      64x8x8             576               67
    point6   1x1                             96x8x8           6,144               67
    linear   global average pool, linear     10                 970       whole image
    BatchNorm after each convolution                          2,432
    total                                                    73,994

Dropout follows conv2 and every pointwise layer: 0.1 at 32x32, 0.15 at 16x16, 0.2 at 8x8, where
single values carry more of the decision and the network would otherwise lean on a few of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Muon with peaks near the best of model 2's trials of 8 epochs; dropout off, since 74,000 weights
# are too few to learn 50,000 images by heart. After 8 epochs, with augmentation at 0.1, it was no
# better on the training images than on the 5,000 held-out ones (83.8 and 84.5 %). With the crop of
# models 1 and 2 instead of Affine, three seeds show no difference: docs/recipes.md.
RECIPE = {
    "optimizer": "muon",  # orthogonalised steps on the convolutions, SGD on the rest
    "lr": 0.08,  # the schedule's peak, of the convolutions
    "other_lr": 0.25,  # of BatchNorm and the linear layer
    "momentum": 0.9,  # of those; Muon's own is 0.6
    "weight_decay": 5e-4,  # on the linear layer alone: Muon keeps the norm of filters
    "schedule": "onecycle",  # linear up, then linear down to zero, a step at a time
    "warmup": 0.2,  # share of the steps on the way up
    "batch_size": 256,
    "label_smoothing": 0.0,
    "dropout": 0.0,  # off
    "augment": 0.4,  # probability of Affine, and of CoarseDropout, ...
    "augment_epochs": 75,  # ... in runs of so many epochs; less in shorter ones
    "target_accuracy": 85.0,  # % on the test set ...
    "target_epochs": 75,  # ... within so many epochs
}

# The recipe that the network was published with: 85 % at epoch 66, 86.4 % after 100 epochs. Here
# (`--recipe published`, seed 0): 85 % at epoch 69, 86.16 % after 100 epochs. Its weight decay is
# not known; this is AdamW's default.
PUBLISHED = {
    "optimizer": "adamw",
    "lr": 0.015,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "batch_size": 2048,
    "target_accuracy": 85.0,
    "target_epochs": 75,
}


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution without bias, padded so that only the stride changes the size, and BatchNorm."""
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class CNN_Model_3(nn.Module):
    """The network of the table above: (N, 3, 32, 32) normalised images to (N, 10) logits."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, 32, 3)
        self.conv2 = conv_bn(32, 32, 3)
        self.drop1 = nn.Dropout(0.1)
        self.depth1 = conv_bn(32, 32, 3, stride=2, groups=32)
        self.point1 = conv_bn(32, 64, 1)
        self.drop2 = nn.Dropout(0.15)
        self.depth2 = conv_bn(64, 64, 3, groups=64)
        self.point2 = conv_bn(64, 96, 1)
        self.drop3 = nn.Dropout(0.15)
        self.reduce2 = conv_bn(96, 64, 1)
        self.depth3 = conv_bn(64, 64, 3, groups=64)
        self.point3 = conv_bn(64, 96, 1)
        self.drop4 = nn.Dropout(0.15)
        self.reduce3 = conv_bn(96, 64, 1)
        self.depth4 = conv_bn(64, 64, 3, stride=2, groups=64)
        self.point4 = conv_bn(64, 96, 1)
        self.drop5 = nn.Dropout(0.2)
        self.reduce4 = conv_bn(96, 64, 1)
        self.depth5 = conv_bn(64, 64, 3, dilation=2, groups=64)
        self.point5 = conv_bn(64, 96, 1)
        self.drop6 = nn.Dropout(0.2)
        self.reduce5 = conv_bn(96, 64, 1)
        self.depth6 = conv_bn(64, 64, 3, dilation=4, groups=64)
        self.point6 = conv_bn(64, 96, 1)
        self.drop7 = nn.Dropout(0.2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))  # (N, 32, 32, 32)
        x = self.drop1(F.relu(self.conv2(x)))  # (N, 32, 32, 32)
        x = F.relu(self.depth1(x))  # (N, 32, 16, 16)
        x = self.drop2(F.relu(self.point1(x)))  # (N, 64, 16, 16)
        x = F.relu(self.depth2(x))  # (N, 64, 16, 16)
        x = self.drop3(F.relu(self.point2(x)))  # (N, 96, 16, 16)
        x = F.relu(self.reduce2(x))  # (N, 64, 16, 16)
        x = F.relu(self.depth3(x))  # (N, 64, 16, 16)
        x = self.drop4(F.relu(self.point3(x)))  # (N, 96, 16, 16)
        x = F.relu(self.reduce3(x))  # (N, 64, 16, 16)
        x = F.relu(self.depth4(x))  # (N, 64, 8, 8)
        x = self.drop5(F.relu(self.point4(x)))  # (N, 96, 8, 8)
        x = F.relu(self.reduce4(x))  # (N, 64, 8, 8)
        x = F.relu(self.depth5(x))  # (N, 64, 8, 8)
        x = self.drop6(F.relu(self.point5(x)))  # (N, 96, 8, 8)
        x = F.relu(self.reduce5(x))  # (N, 64, 8, 8)
        x = F.relu(self.depth6(x))  # (N, 64, 8, 8)
        x = self.drop7(F.relu(self.point6(x)))  # (N, 96, 8, 8)
        x = torch.flatten(self.pool(x), 1)  # (N, 96)
        return self.linear(x)  # (N, 10)


if __name__ == "__main__":
    from torchsummary import summary

    summary(CNN_Model_3(), (3, 32, 32), device="cpu")
