package driver

//go:noescape
func prefetchLines(p *byte)
