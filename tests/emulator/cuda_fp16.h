// Stands for CUDA's header.
#pragma once

#include "emulator.h"
