// From the attributes of a custom call to the plan that runs it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "kernel.h"

namespace jf {

// The attributes of a custom call (jax_flash/spec.py), wherever they come from. Asking for one that is missing or of
// another type throws.
class Attributes {
 public:
  virtual ~Attributes() = default;
  virtual int64_t Integer(const char* name) const = 0;
  virtual float Number(const char* name) const = 0;
  virtual bool Flag(const char* name) const = 0;
  virtual std::string_view Text(const char* name) const = 0;
};

// The target names of the custom calls; throws on any other name.
Direction DirectionOf(std::string_view target);

// `arch` is left 0 for the caller to set.
Call DecodeCall(Direction direction, const Attributes& attributes);

// Equal for calls that share a plan, different for all others.
std::string CallKey(const Call& call);

// The plan of the first kernel in the table that runs the call on call.arch, or why none does.
Planned MakePlan(const Call& call);

// What the scratch buffer must hold on whatever GPU the program ends up: the largest need over all architectures.
size_t ScratchBytes(Call call);

}  // namespace jf
