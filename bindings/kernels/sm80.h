// What the planners of the sm80 kernels share.
#pragma once

#include <string>

#include "kernel.h"
#include "sm80/args.h"

namespace jf {

// Why no sm80 kernel runs calls of this kind, or "".
std::string Sm80Refusal(const Spec& spec);

// What a head size is padded to in shared memory: 64, 96, 128, 192 or 256.
int Sm80HeadTile(int size);

// Largest dynamic shared memory of a block.
size_t SharedLimit(int arch);

// Whether scores need more than products and bounds: such variants take smaller tiles to stay within the registers.
bool HasScoreFeatures(const Spec& spec);

// `constexpr jf::Sm80Tiles kTiles{...};`
std::string TilesText(const Sm80Tiles& tiles);

// How many (batch entry, query head) pairs run side by side: as many as have their keys and values in 32 MiB of L2,
// whole groups of heads at a time.
int L2Section(const Call& call);

}  // namespace jf
