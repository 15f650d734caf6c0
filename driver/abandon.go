package driver

import "scoria/driver/block"

// Doom ends the requests of an engine that is deemed dead, except those that come at
// the same moment: repeat it until nobody submits any more, then call Abandon. Both
// are for tests that kill a daemon without ending the process; after them the engine
// is of no use.
func (e *Engine) Doom() {
	for _, v := range e.list() {
		v.closing.Store(true)
		v.cancel()
		for _, p := range v.parked.remove(func(*parkedWrite) bool { return true }) {
			v.end(p.r, block.ErrClosed)
		}
	}
}

// Abandon stops the goroutines of an engine that is deemed dead, and ends the
// requests that wait. Its mappings stay, as late stores of it may still come.
func (e *Engine) Abandon() {
	e.Doom()
	select {
	case <-e.stop:
		return
	default:
	}
	close(e.stop)
	e.stopped.Wait()
	for _, v := range e.list() {
		v.stopSpawning()
		v.background.Wait()
	}
}
