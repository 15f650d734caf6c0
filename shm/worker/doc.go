// Package worker serves rings in shared memory: it is what the vhost-user and
// the shared-memory front ends have in common. A Set of Workers, each locked to
// its thread, serves the Queues of all volumes and of both front ends; a Queue
// takes requests from its Ring, which knows the layout in memory, gives them to
// a block.Device in batches, and answers them in the ring.
//
// # Goroutines
//
// One per worker, and one watchdog per Set while it has queues: it frees a
// worker from a call eventfd that its owner made blocking and filled.
//
// A Queue, once started, belongs to one worker: only that goroutine calls its
// Ring's methods. Others change a running queue by sending the worker a function
// to run between two passes (Queue.Do). Requests that the device takes over
// complete on any goroutine, which pushes them on the worker's lock-free list
// and wakes it if it sleeps. Workers take no lock in the steady state.
//
// # Polling
//
// A worker passes over its active queues without asking the kernel. A queue
// that finds nothing to do is polled for its window, then asks the peer for
// kicks and becomes inactive. The window doubles when polling finds work and
// shrinks to nothing when it does not, as is the case when the client shares
// the CPU; then, seldom, a single window probes whether that changed. Waits with
// requests at the device have a window of their own: whether polling pays then
// depends on how long the device takes. A queue is polled anew after answers that
// came late, because the peer's next request is near. Time
// polled in vain is bounded by Config.PollCPU. With no active queue the worker
// sleeps in epoll_wait.
//
// A worker that has signalled a peer gives its CPU away once before it asks for
// kicks (sched_yield): a peer that shares the CPU takes its answers and adds
// requests then, and nobody has to wake anybody. Where that does not pay it is
// rarely done (giveWay).
//
// # Fairness
//
// Active queues take turns: a queue gives the device so many requests or so many
// bytes (passLimit, passBytes), whichever comes first. A worker that is never out
// of work asks for the kicks of the other queues after so much work
// (busyPollWork), and lets other threads of its CPU run while requests are carried
// out there. So what a busy queue costs a quiet one does not depend on how deep
// the busy one is or how large its requests are, up to what a device copies at
// once.
//
// # Faults
//
// Workers run with debug.SetPanicOnFault. A fault on a ring's memory (the peer
// shrank its file) is recovered from, breaks that queue and is told to its Ring;
// any other panic goes on.
package worker
