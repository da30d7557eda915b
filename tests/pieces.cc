// pieces/mask.cuh and sm90/first_keys.cuh as the kernels include them, compiled for the host: what tests/test_pieces.py
// calls.
#include <initializer_list>
#include <utility>

#include "pieces/mask.cuh"
#include "sm90/first_keys.cuh"

namespace {

// Calls f with the band that has the given sides bounded.
template <class F>
void WithBand(const int* bounded, const int* numbers, F f) {
  const auto [left, right] = std::pair(bounded[0] != 0, bounded[1] != 0);
  const auto call = [&](auto band) { f(band); };
  const int offset = numbers[0], to_left = numbers[1], to_right = numbers[2], q_end = numbers[3], kv_end = numbers[4];
  if (left && right) call(jf::make_band<true, true>(offset, to_left, to_right, q_end, kv_end));
  if (left && !right) call(jf::make_band<true, false>(offset, to_left, to_right, q_end, kv_end));
  if (!left && right) call(jf::make_band<false, true>(offset, to_left, to_right, q_end, kv_end));
  if (!left && !right) call(jf::make_band<false, false>(offset, to_left, to_right, q_end, kv_end));
}

}  // namespace

extern "C" {

// numbers: offset, keys to the left, keys to the right, end of queries, end of keys. visible: [queries, keys].
void visible(const int* bounded, const int* numbers, int queries, int keys, bool* visible) {
  WithBand(bounded, numbers, [&](auto band) {
    for (int q = 0; q < queries; ++q) {
      for (int k = 0; k < keys; ++k) visible[q * keys + k] = band.visible(q, k);
    }
  });
}

// ranges: begin and end of the keys of the queries, of the queries of the keys, and of their tiles; of the key tiles
// that all of the queries see whole, of the query tiles that see all of the keys; interior of the tile.
void tile(const int* bounded, const int* numbers, int q0, int queries, int k0, int keys, int* ranges) {
  WithBand(bounded, numbers, [&](auto band) {
    const jf::Range of_queries = band.keys_of(q0, queries), of_keys = band.queries_of(k0, keys);
    const jf::Range key_tiles = jf::tiles_of(of_queries, keys), query_tiles = jf::tiles_of(of_keys, queries);
    const jf::Range inner = band.interior_tiles(q0, queries, keys),
                    inner_queries = band.interior_query_tiles(k0, keys, queries);
    for (jf::Range range : {of_queries, of_keys, key_tiles, query_tiles, inner, inner_queries}) {
      *ranges++ = range.begin;
      *ranges++ = range.end;
    }
    *ranges = band.interior(q0, queries, k0, keys);
  });
}

bool ids_meet(const int* bounds) {
  return jf::IdBounds{bounds[0], bounds[1]}.meets(jf::IdBounds{bounds[2], bounds[3]});
}

bool ids_are_one(const int* bounds) {
  return jf::IdBounds{bounds[0], bounds[1]}.same_single_id(jf::IdBounds{bounds[2], bounds[3]});
}

// places: pair and key tile of each work item.
void places_after_first_keys(int ahead, int lead, int pairs, int section, int key_tiles, int* places) {
  for (int work = 0; work < pairs * key_tiles; work++) {
    const jf::Place place = jf::place_after_first_keys({ahead, lead}, pairs, section, key_tiles, work);
    *places++ = place.pair;
    *places++ = place.key_tile;
  }
}

}  // extern "C"
