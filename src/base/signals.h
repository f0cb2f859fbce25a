#pragma once

namespace megalodon {

// From here on the first SIGINT or SIGTERM only sets a flag, which long work polls and ends at its next whole
// step; a second one ends the process at once. SIGPIPE and SIGXFSZ are ignored: the write reports them.
void catch_interrupts();

bool interrupted();

}  // namespace megalodon
