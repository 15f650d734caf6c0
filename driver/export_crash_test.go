package driver

import "scoria/driver/block"

// Doom ends the requests of an engine whose process is deemed dead, except those
// that come at the same moment: repeat it until nobody submits any more, then
// call Abandon.
func (e *Engine) Doom() {
	for _, v := range e.list() {
		v.closing.Store(true)
		v.cancel()
		for _, p := range v.parked.remove(func(*parkedWrite) bool { return true }) {
			v.end(p.r, block.ErrClosed)
		}
	}
}
