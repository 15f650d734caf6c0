// Package schedule decides when snapshots are made and which of them go: it reads
// rules such as "every 1h keep 24" and "daily at 02:30 keep 7", and turns the time,
// the rules and what there is into what is to be done. It is pure: no clock, no
// I/O, no goroutine; the daemon's runner executes its decisions.
//
// # Rules
//
//	every 15m keep 8
//	hourly [at :15] keep 24
//	daily [at 02:30[,14:30 …]] keep 7
//	weekly [on sun[,wed …]] [at 02:30] keep 4
//	monthly [on 1[,15 …]] [at 02:30] keep 12
//
// Each rule has slots: the moments at which it wants a snapshot. Those of `every`
// are the multiples of its interval since 1970 in UTC; those of the others are
// times on the wall clock of the schedule's time zone. A time that a day does not
// have (summer time begins) is the moment at which the clocks change; one that it
// has twice is the first of the two. Day 31 of a shorter month is its last day.
//
// # What is made
//
// One snapshot when any rule has had a slot since the last run, for all rules
// together. Slots that passed while nobody looked are missed: they are reported
// once, and one snapshot makes up for all.
//
// # What is kept
//
// Each rule sorts the snapshots by the slot that each follows, and keeps the first
// one after each of its newest N slots that have any. What no rule keeps goes. So
// a snapshot serves every rule that it suits, and a changed rule keeps what there
// is as well as it can. Never deleted are: what was not made here, snapshots that
// clones read, snapshots from a time that has not come yet (the clock was wrong),
// and the newest of all.
//
// # A clock that goes back
//
// Back by less than a slot: the slots that come a second time get no second
// snapshot. Back by more: counting begins anew from then on.
package schedule
