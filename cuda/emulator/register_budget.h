// setmaxnreg on the emulator: registers are only counted.
#pragma once

namespace emulator {

// The running thread's warpgroup wants `registers` a thread: more than before (`increase`) or fewer. What a warpgroup has
// before its first setmaxnreg depends on the compiler; an equal share of all registers is assumed.
void set_register_budget(unsigned registers, bool increase);

}  // namespace emulator
