// The order of key tiles where a pair's first one stores dq and the others wait for it (FirstKeys). Plain C++, compiled
// for the host too and tested there.
#pragma once
#include "pieces/mask.cuh"
#include "sm90/backward_args.h"

namespace jf {

// A key tile of a (batch entry, key head) pair.
struct Place {
  int pair, key_tile;
};

// Work item `work` of pairs * key_tiles, which are at least two a pair.
constexpr JF_HOST_DEVICE Place place_after_first_keys(FirstKeys first, int pairs, int section, int key_tiles,
                                                      int work) {
  const int first_pairs = smaller(first.ahead * section, pairs);
  if (work < first_pairs) return {work, 0};
  work -= first_pairs;
  // Of `begin` sections the other tiles alone; then a section's first tiles and the others of that `lead` before it.
  const int others = section * (key_tiles - 1), begin = first.ahead - first.lead;
  const int mixed_sections = ceil_div(pairs - first_pairs, section);
  const int mixed = mixed_sections * others + pairs - first_pairs;
  int done = 0;  // sections
  if (work >= begin * others) {
    work -= begin * others, done = begin;
    if (work < mixed) {
      const int round = work / (section + others), next_pair = first_pairs + round * section;
      const int next = smaller(section, pairs - next_pair), rest = work - round * (section + others);
      if (rest < next) return {next_pair + rest, 0};
      return {(begin + round) * section + (rest - next) % section, 1 + (rest - next) / section};
    }
    work -= mixed, done += mixed_sections;
  }
  const int pair = (done + work / others) * section, rest = work % others, width = smaller(section, pairs - pair);
  return {pair + rest % width, 1 + rest / width};
}

}  // namespace jf
